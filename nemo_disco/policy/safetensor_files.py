"""Safetensors directories: checked before anything is built, read tensor by tensor, written atomically.

Knows files and names, nothing of megatron.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.files import save_tensors
from nemo_disco.runtime.saved_files import check_file

_SHARD_BYTES = 4 * 2**30
# What belongs to a model besides its weights.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


class SafetensorReader:
    """The tensors of a directory's *.safetensors files, by name, read when asked for."""

    def __init__(self, directory: str | Path) -> None:
        """Raises UserError: no safetensors there, or a damaged file (named)."""
        self.directory = Path(directory)
        files = sorted(self.directory.glob("*.safetensors"))
        if not files:
            other = next((f.name for f in self.directory.glob("pytorch_model*.bin")), None)
            hint = f" ({other} is pickled and is not opened: convert it to safetensors)" if other else ""
            raise UserError(f"model.path={directory}: no *.safetensors file there{hint}")
        self._stack = ExitStack()
        self._where: dict[str, Any] = {}
        for file in files:
            check_file(file, links=True)
            try:
                handle = self._stack.enter_context(safe_open(file, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file}: damaged safetensors file ({error}); fetch it again") from None
            for name in handle.keys():  # noqa: SIM118 - not a dict
                self._where[name] = handle

    def __enter__(self) -> SafetensorReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def names(self) -> set[str]:
        return set(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._where[name].get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self._where[name].get_tensor(name)
        return tensor

    def read_finite(self, name: str) -> Tensor:
        """As `read`. Raises UserError, by the tensor's name, if a value is NaN or infinite."""
        tensor = self.read(name)
        if not bool(tensor.isfinite().all()):
            bad = int((~tensor.isfinite()).sum())
            raise UserError(
                f"model.path={self.directory}: {bad:,} of the {tensor.numel():,} values of {name} are NaN or infinite: "
                "the model has diverged or is damaged; take another"
            )
        return tensor


def check_weights(reader: SafetensorReader, hf_config: Any) -> None:
    """Every tensor that the config asks for is there with its shape, and nothing else. Raises UserError, by name."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        expected = {n: tuple(t.shape) for n, t in AutoModelForCausalLM.from_config(hf_config).state_dict().items()}
    names = reader.names()
    if hf_config.tie_word_embeddings:
        names.discard("lm_head.weight")
        expected.pop("lm_head.weight", None)
    missing, unexpected = sorted(expected.keys() - names), sorted(names - expected.keys())
    if missing or unexpected:
        said = [
            f"{what} {', '.join(n[:3])}{' ...' if len(n) > 3 else ''} ({len(n)})"
            for what, n in (("missing", missing), ("unexpected", unexpected))
            if n
        ]
        raise UserError(f"{reader.directory}: the weights do not fit config.json: {'; '.join(said)}")
    for name, shape in expected.items():
        if reader.shape(name) != shape:
            raise UserError(f"{reader.directory}: {name} has shape {reader.shape(name)}, config.json says {shape}")


def save_hf_directory(
    directory: Path, tensors: Iterable[tuple[str, Tensor]], hf_config: Any, companions_from: str | Path
) -> None:
    """Write weights (in shards of at most 4 GiB with an index), config, tokenizer, chat template and generation config.

    Tensors take the dtype that the config names. Memory: one shard.
    """
    dtype = hf_config.dtype
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        nonlocal pending, size
        save_tensors(pending, directory / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(pending))
        pending, size = {}, 0

    for name, tensor in tensors:
        pending[name] = tensor.detach().to("cpu", dtype or tensor.dtype, copy=True).contiguous()
        nbytes = pending[name].nbytes
        size, total = size + nbytes, total + nbytes
        if size >= _SHARD_BYTES:
            flush()
    if pending or not shards:
        flush()
    _name_shards(directory, shards, total)
    hf_config.save_pretrained(directory)
    for name in COMPANIONS:
        source = Path(companions_from) / name
        if source.is_file():
            shutil.copy2(source, directory / name)


def _name_shards(directory: Path, shards: list[list[str]], total: int) -> None:
    if len(shards) == 1:
        (directory / "shard-0").rename(directory / "model.safetensors")
        return
    weight_map = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"shard-{i}").rename(directory / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True))
