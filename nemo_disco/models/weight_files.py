"""Safetensors directories: checked before anything is built, read tensor by tensor, written atomically.

Knows files and names, nothing of megatron.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from typing_extensions import TypedDict

from nemo_disco.data.tokenizer import adapt_tokenizer_config
from nemo_disco.models import architecture
from nemo_disco.models.directory import safetensor_names
from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.safetensor_writer import Plan, write_safetensors
from nemo_disco.runtime.saved_files import FileError, check_file, read_json

(EMBEDDING,), (OUTPUT,) = architecture.EMBEDDING.parts, architecture.OUTPUT.parts
_PLAIN = {"F64", "F32", "F16", "BF16"}
_COMPARED_BYTES = 2**26
# Angles of rope, which old Llama files hold and every network computes from config.json.
_COMPUTED_BUFFER = re.compile(r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
_NUMBERED = re.compile(r"(.+-)\d{5}-of-(\d{5})\.safetensors")
_LFS = b"version https://git-lfs"
# What belongs to a model besides its weights and config.json.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model*",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
    "*.py",  # a tokenizer's own code
)


class SafetensorReader:
    """The tensors of a Hugging Face directory's weights, by name, read when asked for.

    Which files hold them is transformers' rule: model.safetensors, else those that the index names, else every
    *.safetensors there but those of other formats. Buffers of old files that a network computes anew are left out.
    """

    def __init__(self, directory: str | Path) -> None:
        """Raises UserError: no safetensors there, a file missing or damaged (named), or one tensor in two files."""
        self.directory = Path(directory)
        self._stack = ExitStack()
        self._where: dict[str, Any] = {}
        files: dict[str, Path] = {}
        for file in _weight_files(self.directory):
            check_file(file, links=True)
            try:
                handle = self._stack.enter_context(safe_open(file, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file}: {_damage(file, error)}") from None
            for name in handle.keys():  # noqa: SIM118 - not a dict
                if (other := files.setdefault(name, file)) is not file:
                    raise UserError(
                        f"{self.directory}: {name} is in {other.name} and in {file.name}; remove the file that is not "
                        "the model's"
                    )
                if not _COMPUTED_BUFFER.fullmatch(name):
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

    def check(self, expected: Mapping[str, tuple[int, ...]], tied: bool) -> None:
        """Every tensor of the network is there with its shape, as plain numbers, and nothing else.

        tied: the output layer is the embedding; a file that holds it once more must say the same. Raises UserError, by
        name.
        """
        found = {name: self.shape(name) for name in self._where}
        repeated = found.pop(OUTPUT, None) if tied else None
        check_tensors(self.directory, expected, found)
        for name in expected:
            if (kind := self._where[name].get_slice(name).get_dtype()) not in _PLAIN:
                raise UserError(
                    f"{self.directory}: {name} is of type {kind}, so its numbers are quantized: give the directory "
                    "of the unquantized model"
                )
        if repeated is not None and (repeated != found[EMBEDDING] or not self._equal(OUTPUT, EMBEDDING)):
            raise UserError(
                f"{self.directory}: {OUTPUT} differs from {EMBEDDING}, and config.json says that they are one "
                "(tie_word_embeddings): set that to false if the model has an output layer of its own"
            )

    def _equal(self, one: str, other: str) -> bool:
        """Whether two tensors of one shape are equal, read by and by."""
        left, right = (self._where[name].get_slice(name) for name in (one, other))
        rows, width = self.shape(one)
        step = max(1, _COMPARED_BYTES // (8 * width))
        return all(torch.equal(left[i : i + step].double(), right[i : i + step].double()) for i in range(0, rows, step))


def check_tensors(place: Path, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    """Raises UserError naming what is missing in `found`, unexpected there, or of another shape than config.json's."""
    faults = [
        f"{what} {', '.join(sorted(names)[:3])}{' ...' if len(names) > 3 else ''} ({len(names)})"
        for what, names in (("missing", expected.keys() - found.keys()), ("unexpected", found.keys() - expected.keys()))
        if names
    ]
    faults += [
        f"{name} has shape {found[name]}, config.json says {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ][:3]
    if faults:
        raise UserError(f"{place}: the weights do not fit config.json: {'; '.join(faults)}")


def _weight_files(directory: Path) -> list[Path]:
    """The files that hold the weights. Raises UserError if there are none, or one of them is missing."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        return _indexed_files(index)
    names = safetensor_names(directory)
    for name in names:
        if match := _NUMBERED.fullmatch(name):
            _require(directory, [f"{match[1]}{i:05d}-of-{match[2]}.safetensors" for i in range(1, int(match[2]) + 1)])
    return [directory / name for name in names]


class _Index(TypedDict):
    weight_map: dict[str, str]


def _indexed_files(index: Path) -> list[Path]:
    """Raises UserError for an index that is none, or names a file that is missing or elsewhere."""
    try:
        names = sorted(set(read_json(index, _Index, links=True)["weight_map"].values()))
    except FileError as fault:
        raise UserError(f"{fault}; fetch it again") from None
    if elsewhere := [name for name in names if Path(name).name != name]:
        raise UserError(f"{index}: it names {elsewhere[0]!r}, a file in another directory; fetch it again")
    _require(index.parent, names)
    return [index.parent / name for name in names]


def _require(directory: Path, names: list[str]) -> None:
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise UserError(
            f"{directory}: {', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''} missing ({len(missing)} of "
            f"{len(names)} files of weights); fetch it again"
        )


def _damage(file: Path, error: Exception) -> str:
    try:
        with file.open("rb") as stream:
            pointer = stream.read(len(_LFS)) == _LFS
    except OSError:
        pointer = False
    if pointer:
        return "a Git LFS pointer, not the weights: run `git lfs pull` in that directory"
    return f"damaged safetensors file ({error}); fetch it again"


def save_hf_directory(
    directory: Path, plan: Plan, tensors: Iterable[tuple[str, Tensor]], config: Mapping[str, Any], source: Path
) -> None:
    """Write a model: weights with an index where there are several files, config.json, and the companions of `source`.

    plan: name, shape and type of each tensor, in the order in which `tensors` has them, which are cast. config: what
    read_hf_config returned. Memory: one tensor.
    """
    dtypes = {name: dtype for name, _, dtype in plan}
    write_safetensors(directory, plan, ((name, t.detach().to("cpu", dtypes[name])) for name, t in tensors))
    copy_companions(source, directory, config)


def copy_companions(source: Path, target: Path, config: Mapping[str, Any]) -> None:
    """Write config.json, and copy what else belongs to a model besides its weights. Modes are as the umask says, not
    as the source's were. A tokenizer that transformers misreads there is one that it reads right here."""
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for pattern in COMPANIONS:
        for file in filter(Path.is_file, sorted(source.glob(pattern))):
            copy = target / file.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)
    adapt_tokenizer_config(target)
