"""Safetensors files of a Hugging Face directory: checked before a network is built, read and written by tensor."""

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
from nemo_disco.runtime.safetensor_writer import TensorPlan, write_safetensors
from nemo_disco.runtime.saved_files import FileError, check_file, read_json

(EMBEDDING,), (OUTPUT,) = architecture.EMBEDDING.parts, architecture.OUTPUT.parts
_PLAIN = {"F64", "F32", "F16", "BF16"}
_COMPARED_BYTES = 2**26
# Rope's angles, which old Llama files have too; networks compute them from config.json.
_COMPUTED_BUFFER = re.compile(r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
_NUMBERED = re.compile(r"(.+-)\d{5}-of-(\d{5})\.safetensors")
_LFS = b"version https://git-lfs"
# Files of a model besides its weights and config.json.
COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model*", "tekken.json", "chat_template.jinja", "chat_template.json",
    "additional_chat_templates/*.jinja", "generation_config.json", "*.py",  # *.py: a tokenizer's own code
)  # fmt: skip


class SafetensorReader:
    """Reads the tensors of a Hugging Face directory by name, one at a time.

    They are in the same files as for transformers: model.safetensors, else those that the index names, else every
    *.safetensors that is not of another format. Buffers in old files that networks compute themselves are left out.
    """

    def __init__(self, directory: str | Path) -> None:
        """Raises UserError if a file is missing or damaged, there is none, or two have the same tensor."""
        self.directory = Path(directory)
        self._stack = ExitStack()
        self._handles: dict[str, Any] = {}
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
                    self._handles[name] = handle

    def __enter__(self) -> SafetensorReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._handles[name].get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self._handles[name].get_tensor(name)
        return tensor

    def read_finite(self, name: str) -> Tensor:
        """The tensor of that name. Raises UserError if a value is NaN or infinite."""
        tensor = self.read(name)
        if not bool(tensor.isfinite().all()):
            bad = int((~tensor.isfinite()).sum())
            raise UserError(
                f"model.path={self.directory}: {bad:,} of the {tensor.numel():,} values of {name} are NaN or infinite: "
                "the model has diverged or is damaged; take another"
            )
        return tensor

    def check(self, expected: Mapping[str, tuple[int, ...]], tied: bool) -> None:
        """Raise UserError, naming the tensor, unless there are exactly the expected ones, unquantized.

        tied: the output layer is the embedding; a file may have it too, with equal numbers.
        """
        shapes = {name: self.shape(name) for name in self._handles}
        repeated = shapes.pop(OUTPUT, None) if tied else None
        check_tensors(self.directory, expected, shapes)
        for name in expected:
            if (kind := self._handles[name].get_slice(name).get_dtype()) not in _PLAIN:
                raise UserError(
                    f"{self.directory}: {name} is of type {kind}, so its numbers are quantized: give the directory "
                    "of the unquantized model"
                )
        if repeated is not None and (repeated != shapes[EMBEDDING] or not self._equal(OUTPUT, EMBEDDING)):
            raise UserError(
                f"{self.directory}: {OUTPUT} differs from {EMBEDDING}, and config.json says that they are one "
                "(tie_word_embeddings): set that to false if the model has an output layer of its own"
            )

    def _equal(self, first: str, second: str) -> bool:
        """True if two tensors of the same shape are equal; reads a few rows at a time."""
        left, right = (self._handles[name].get_slice(name) for name in (first, second))
        rows, width = self.shape(first)
        step = max(1, _COMPARED_BYTES // (8 * width))
        return all(torch.equal(left[i : i + step].double(), right[i : i + step].double()) for i in range(0, rows, step))


def check_tensors(place: Path, expected: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise UserError naming the tensors of `shapes` that are missing, unexpected or of another shape than expected."""
    differences = {"missing": expected.keys() - shapes.keys(), "unexpected": shapes.keys() - expected.keys()}
    faults = [
        f"{fault} {', '.join(sorted(names)[:3])}{' ...' if len(names) > 3 else ''} ({len(names)})"
        for fault, names in differences.items()
        if names
    ]
    faults += [
        f"{name} has shape {shapes[name]}, config.json says {shape}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ][:3]
    if faults:
        raise UserError(f"{place}: the weights do not fit config.json: {'; '.join(faults)}")


def _weight_files(directory: Path) -> list[Path]:
    """The files of the weights. Raises UserError if there are none, or one of them is missing."""
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
    """The files that an index names. Raises UserError if it is damaged or a file is missing or elsewhere."""
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
    """A message on a file that does not open: its fault, and what to do about it."""
    try:
        with file.open("rb") as stream:
            pointer = stream.read(len(_LFS)) == _LFS
    except OSError:
        pointer = False
    if pointer:
        return "a Git LFS pointer, not the weights: run `git lfs pull` in that directory"
    return f"damaged safetensors file ({error}); fetch it again"


def save_hf_directory(
    directory: Path, plan: TensorPlan, tensors: Iterable[tuple[str, Tensor]], config: Mapping[str, Any], source: Path
) -> None:
    """Write a model: its weights (with an index if in several files), config.json, and the other files of `source`.

    plan: name, shape and type of each tensor, in the order of `tensors`, which are cast to that type. config: as from
    read_hf_config. Needs the memory of one tensor.
    """
    dtypes = {name: dtype for name, _, dtype in plan}
    write_safetensors(directory, plan, ((name, t.detach().to("cpu", dtypes[name])) for name, t in tensors))
    copy_companions(source, directory, config)


def copy_companions(source: Path, target: Path, config: Mapping[str, Any]) -> None:
    """Write config.json, and copy a model's other files besides its weights, with the permissions of new files.

    A tokenizer's configuration that transformers would misread is corrected in the copy.
    """
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for pattern in COMPANIONS:
        for file in filter(Path.is_file, sorted(source.glob(pattern))):
            copy = target / file.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)
    adapt_tokenizer_config(target)
