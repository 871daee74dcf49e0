"""`.metadata` of a torch distributed checkpoint: a pickle, opened by a list of classes alone. Not megatron's business.

The one unpickler of the program: what this program wrote is opened by a short list, what others wrote by a longer one.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.saved_files import FileError, read_bytes

METADATA = ".metadata"
LARGEST = 1 << 30  # bytes; 10,000 tensors in 1,000 pieces each have as many
DEEPEST = 100  # objects in one another; megatron's own have about twelve
_MARK = -1
# BytesStorageMetadata is left out on purpose: what it announces, torch unpickles without restriction.
_OURS = {
    ("torch", "Size"),
    ("torch", "bfloat16"),
    ("torch", "float32"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "Metadata"),
    ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
    ("torch.distributed.checkpoint.metadata", "TensorProperties"),
    ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
}
_NOT_OURS = "which no checkpoint of ours holds: it was not written by this program and is not opened"


def read_metadata(file: Path, admitted: Collection[tuple[str, str]] = _OURS, refusal: str = _NOT_OURS) -> Metadata:
    """The metadata of a torch distributed checkpoint. Raises UserError if it is damaged, or asks for anything else.

    admitted: (module, name) of what the pickle may ask for; by default what this program writes. refusal: why the rest
    is not opened.
    """
    content = read_bytes(file, LARGEST)
    try:
        _check_opcodes(content)
        metadata = _Unpickler(file, content, admitted, refusal).load()
        _check_shape(metadata)
    except UserError:
        raise
    except Exception as error:  # whatever a damaged pickle makes of the classes that it may ask for
        said = " ".join(str(error).split())[:100] or type(error).__name__
        raise FileError(file, f"damaged, not the metadata of a checkpoint ({said})") from None
    checked: Metadata = metadata
    return checked


def _check_opcodes(content: bytes) -> None:
    """Raises ValueError where the pickle asks for more than it is, or nests too deep.

    Unpickling allocates by the number it reads, and an altered bit of one made 18 GB of a small file; hashing a deep
    tuple ends the process.
    """
    stack: list[int] = []  # each object's depth; _MARK is a mark
    memo: dict[int, int] = {}
    for opcode, argument, _ in pickletools.genops(content):
        # Lengths of texts and bytes are checked by genops itself, which finds the text's end before the file's.
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > len(content):
            raise ValueError(f"{opcode.name} {argument} in {len(content)} bytes")
        if opcode.name == "MARK":
            stack.append(_MARK)
        elif opcode.name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if argument is None else int(argument)] = stack[-1]
        elif opcode.name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[int(argument or 0)])
        else:
            depth = _depth(opcode, stack)
            if depth > DEEPEST:
                raise ValueError(f"nested more than {DEEPEST} deep")
            stack += [depth] * len(opcode.stack_after)


def _depth(opcode: pickletools.OpcodeInfo, stack: list[int]) -> int:
    """The depth of what the opcode makes of the objects that it takes off the stack."""
    takes = opcode.stack_before
    parts: list[int] = []
    if pickletools.markobject in takes:
        while (top := stack.pop()) != _MARK:
            parts.append(top)
        takes = takes[: takes.index(pickletools.markobject)]
    parts += [stack.pop() for _ in takes]
    if opcode.name in ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD", "DUP"):
        *items, grown = parts
        return max(grown, 1 + max(items, default=-1))
    return 1 + max(parts, default=-1)


def _check_shape(metadata: Any) -> None:
    """Raises ValueError unless it is what readers rely on: tensors of pieces inside them, and each piece's place."""
    if type(metadata) is not Metadata or not isinstance(metadata.state_dict_metadata, dict):
        raise ValueError("it is not one")
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(name, str) or not isinstance(entry, TensorStorageMetadata | BytesStorageMetadata):
            raise ValueError(f"no entry of a tensor: {name!r:.50}")
        if isinstance(entry, TensorStorageMetadata):
            _check_tensor(name, entry)
    if not isinstance(metadata.storage_data, dict):
        raise ValueError("it says of no tensor where it is")
    for index, info in metadata.storage_data.items():
        place = isinstance(index, MetadataIndex) and isinstance(info, _StorageInfo)
        if not place or not isinstance(index.fqn, str) or not isinstance(info.relative_path, str):
            raise ValueError("it says of a tensor no place")
        if not _counts((info.offset, info.length)) or not (index.offset is None or _counts(index.offset)):
            raise ValueError(f"the place of {index.fqn} is {info.offset!r:.50}, {info.length!r:.50}")


def _check_tensor(name: str, entry: TensorStorageMetadata) -> None:
    if not _counts(entry.size) or not isinstance(entry.properties.dtype, torch.dtype):
        raise ValueError(f"no size or type of {name}")
    for chunk in entry.chunks:
        whole = isinstance(chunk, ChunkStorageMetadata) and _counts(chunk.offsets) and _counts(chunk.sizes)
        if not whole or any(o + n > m for o, n, m in zip(chunk.offsets, chunk.sizes, entry.size, strict=True)):
            raise ValueError(f"a piece of {name} is not inside it")


def _counts(numbers: Sequence[Any]) -> bool:
    return isinstance(numbers, tuple) and all(type(n) is int and 0 <= n < 2**53 for n in numbers)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Path, content: bytes, admitted: Collection[tuple[str, str]], refusal: str) -> None:
        super().__init__(io.BytesIO(content))
        self._file, self._admitted, self._refusal = file, admitted, refusal

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._admitted:
            raise UserError(f"{self._file} asks for {module}.{name}, {self._refusal}")
        return super().find_class(module, name)
