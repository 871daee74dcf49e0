"""Safe reading of `.metadata`, the pickle that lists the tensors of a torch distributed checkpoint.

The program's only unpickler of files: it creates objects of listed classes alone. The list is shorter for checkpoints
of this program than for those of others.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from nemo_disco.runtime.errors import UserError, one_line
from nemo_disco.runtime.saved_files import FileError, read_bytes

METADATA = ".metadata"
LARGEST = 1 << 30  # bytes; the metadata of 10,000 tensors in 1,000 pieces each is about as large
DEEPEST = 100  # levels of nested objects; megatron's own files have about twelve
_MARK = -1
# BytesStorageMetadata is left out on purpose: torch unpickles the bytes that it refers to without restriction.
_OWN_CLASSES = {
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
_REFUSAL = "which no checkpoint of this program contains: another program wrote it, and it is not opened"


def read_metadata(
    file: Path, admitted: Collection[tuple[str, str]] = _OWN_CLASSES, refusal: str = _REFUSAL
) -> Metadata:
    """The metadata of a torch distributed checkpoint. Raises UserError if it is damaged or names another class.

    admitted: (module, name) of the classes and functions that the pickle may name; by default those of this program's
    checkpoints. refusal: the end of the message about any other name, a relative clause.
    """
    content = read_bytes(file, LARGEST)
    try:
        _check_opcodes(content)
        metadata = _Unpickler(file, content, admitted, refusal).load()
        _check_shape(metadata)
    except UserError:
        raise
    except Exception as error:  # a damaged pickle may call the admitted classes with any arguments
        reason = one_line(error, 100) or type(error).__name__
        raise FileError(file, f"damaged, not the metadata of a checkpoint ({reason})") from None
    return cast(Metadata, metadata)


def _check_opcodes(content: bytes) -> None:
    """Raises ValueError if a memo index of the pickle is larger than the file, or its objects are nested too deep.

    Unpickling allocates as much as such an index says (one altered bit made a small file take 18 GB), and hashing a
    deeply nested tuple crashes the process.
    """
    stack: list[int] = []  # the depth of each object, or _MARK
    memo: dict[int, int] = {}
    for opcode, argument, _ in pickletools.genops(content):
        # genops itself raises an error where a string is longer than the rest of the file.
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
    """Pop the opcode's operands from the stack and return the depth of the object that it makes of them."""
    operands = opcode.stack_before
    parts: list[int] = []
    if pickletools.markobject in operands:
        while (top := stack.pop()) != _MARK:
            parts.append(top)
        operands = operands[: operands.index(pickletools.markobject)]
    parts += [stack.pop() for _ in operands]
    if opcode.name in ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD", "DUP"):
        *items, container = parts
        return max(container, 1 + max(items, default=-1))
    return 1 + max(parts, default=-1)


def _check_shape(metadata: Any) -> None:
    """Raises ValueError unless it lists tensors, pieces that lie inside them, and only valid places in files."""
    if type(metadata) is not Metadata or not isinstance(metadata.state_dict_metadata, dict):
        raise ValueError("another kind of object")
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(name, str) or not isinstance(entry, TensorStorageMetadata | BytesStorageMetadata):
            raise ValueError(f"{name!r:.50} has no valid entry")
        if isinstance(entry, TensorStorageMetadata):
            _check_tensor(name, entry)
    if not isinstance(metadata.storage_data, dict):
        raise ValueError("the places of the tensors are missing")
    for index, info in metadata.storage_data.items():
        valid = isinstance(index, MetadataIndex) and isinstance(info, _StorageInfo)
        if not valid or not isinstance(index.fqn, str) or not isinstance(info.relative_path, str):
            raise ValueError("the place of a tensor is not valid")
        if not _are_counts((info.offset, info.length)) or not (index.offset is None or _are_counts(index.offset)):
            raise ValueError(f"the place of {index.fqn} is {info.offset!r:.50}, {info.length!r:.50}")


def _check_tensor(name: str, entry: TensorStorageMetadata) -> None:
    if not _are_counts(entry.size) or not isinstance(entry.properties.dtype, torch.dtype):
        raise ValueError(f"the size or dtype of {name} is not valid")
    for chunk in entry.chunks:
        valid = isinstance(chunk, ChunkStorageMetadata) and _are_counts(chunk.offsets) and _are_counts(chunk.sizes)
        if not valid or any(o + n > m for o, n, m in zip(chunk.offsets, chunk.sizes, entry.size, strict=True)):
            raise ValueError(f"a piece of {name} does not lie inside it")


def _are_counts(numbers: Sequence[Any]) -> bool:
    """True for a tuple of integers from 0 to 2^53 - 1."""
    return isinstance(numbers, tuple) and all(type(n) is int and 0 <= n < 2**53 for n in numbers)


class _Unpickler(pickle.Unpickler):
    """Raises UserError for a class or function that is not admitted."""

    def __init__(self, file: Path, content: bytes, admitted: Collection[tuple[str, str]], refusal: str) -> None:
        super().__init__(io.BytesIO(content))
        self._file, self._admitted, self._refusal = file, admitted, refusal

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._admitted:
            raise UserError(f"{self._file} names {module}.{name}, {self._refusal}")
        return super().find_class(module, name)
