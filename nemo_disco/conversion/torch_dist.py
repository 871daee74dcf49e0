"""Reader and writer of megatron-core's torch_dist format, tensor by tensor, without megatron and without a network.

The format is torch's distributed checkpoint: pieces of global tensors in files, and `.metadata`, a pickle of their
places. Only listed classes are unpickled from it, and pieces with weights_only; other objects are never opened.
"""

from __future__ import annotations

import io
import json
import os
import pickle
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from nemo_disco.checkpoint.metadata import METADATA, read_metadata
from nemo_disco.models.architecture import EMBEDDING
from nemo_disco.runtime.errors import UserError, one_line
from nemo_disco.runtime.saved_files import FileError, open_file

FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_FILESYSTEM, _RECORDS = "torch.distributed.checkpoint.filesystem", "torch.distributed.checkpoint.metadata"
_DTYPES = {"bfloat16", "float16", "float32", "float64", "int64", "int32", "int16", "int8", "uint8", "bool"}
_ADMITTED = {
    ("torch", "Size"),
    *(("torch", name) for name in _DTYPES),
    ("torch.serialization", "_get_layout"),
    (_FILESYSTEM, "_StorageInfo"),
    (_FILESYSTEM, "StorageMeta"),
    ("torch.distributed.checkpoint.storage", "StorageMeta"),
    ("torch.distributed.checkpoint.api", "StorageMeta"),
    *((_RECORDS, name) for name in ("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex")),
    *(
        (_RECORDS, name)
        for name in ("StorageMeta", "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING")
    ),
    ("pathlib", "PosixPath"),
}


@dataclass(frozen=True)
class _Piece:
    """A piece of a stored tensor: its first element's place and its size there, and where in the files it is."""

    offset: tuple[int, ...]
    size: tuple[int, ...]
    info: _StorageInfo


class TorchDistReader:
    """Reads the tensors of a checkpoint directory by name, without `prefix`, which all names of the model share."""

    def __init__(self, directory: Path) -> None:
        """Raises UserError for a directory in another format, a damaged one, and metadata with classes not listed."""
        self.directory = directory
        if not (directory / METADATA).exists():
            raise UserError(f"{directory}: no torch_dist checkpoint (no {METADATA}); give RUN/checkpoints/step_N")
        metadata = read_metadata(directory / METADATA, _ADMITTED, "which no checkpoint needs; it is not opened")
        self._tensors: dict[str, TensorStorageMetadata] = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and not key.startswith(("optimizer.", "chained_", "rng"))
        }
        self._pieces: dict[str, list[_Piece]] = defaultdict(list)
        sizes = {key: {tuple(c.offsets): tuple(c.sizes) for c in entry.chunks} for key, entry in self._tensors.items()}
        for index, info in metadata.storage_data.items():
            if index.fqn in self._tensors:
                offset = tuple(index.offset or [0] * len(self._tensors[index.fqn].size))
                if offset not in sizes[index.fqn]:
                    raise FileError(directory / METADATA, f"damaged: no size for the piece of {index.fqn} at {offset}")
                self._pieces[index.fqn].append(_Piece(offset, sizes[index.fqn][offset], info))
        self._by_row: dict[tuple[str, int], dict[tuple[int, ...], list[_Piece]]] = {}
        self.prefix = next((k.removesuffix(EMBEDDING.name) for k in self._tensors if k.endswith(EMBEDDING.name)), "")

    @cached_property
    def names(self) -> frozenset[str]:
        """Names of the model's tensors, not of the optimizer's."""
        return frozenset(key.removeprefix(self.prefix) for key in self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[self.prefix + name].size)

    def dtype(self, name: str) -> torch.dtype:
        dtype: torch.dtype = self._tensors[self.prefix + name].properties.dtype
        return dtype

    def read(self, name: str, row: tuple[int, ...] = ()) -> Tensor:
        """A tensor, or one row of a stacked tensor: its place in the first dimensions. Needs the memory of the result
        and of one piece.

        Raises UserError if pieces are missing or damaged.
        """
        key = self.prefix + name
        entry, stacks = self._tensors[key], len(row)
        pieces = self._pieces_of(key, row)
        shape = tuple(entry.size)[stacks:]
        if len(pieces) == 1 and pieces[0].size == (*(1,) * stacks, *shape):
            return self._read(pieces[0], entry).view(shape)
        whole = torch.empty(shape, dtype=entry.properties.dtype)
        filled = 0
        for piece in pieces:
            part = self._read(piece, entry)[tuple(r - o for r, o in zip(row, piece.offset, strict=False))]
            place = tuple(slice(o, o + n) for o, n in zip(piece.offset[stacks:], part.shape, strict=True))
            whole[place].copy_(part)
            filled += part.numel()
        if filled != whole.numel():
            raise UserError(f"{self.directory}: pieces of {key} are missing ({filled} of {whole.numel()} numbers)")
        return whole

    def _pieces_of(self, key: str, row: tuple[int, ...]) -> list[_Piece]:
        """The pieces that a row of a stacked tensor is in."""
        index = self._by_row.setdefault((key, len(row)), {})
        if not index:
            for piece in self._pieces[key]:
                spans = [range(o, o + n) for o, n in zip(piece.offset, piece.size, strict=True)]
                for place in product(*spans[: len(row)]):
                    index.setdefault(place, []).append(piece)
        return index.get(row, [])

    def _read(self, piece: _Piece, entry: TensorStorageMetadata) -> Tensor:
        info = piece.info
        if Path(info.relative_path).name != info.relative_path or "\0" in info.relative_path:
            raise UserError(f"{self.directory / METADATA} points at {info.relative_path!r}, outside the checkpoint")
        file = self.directory / info.relative_path
        try:
            with open_file(file) as stream:
                part: Any = _Slice(stream, info.offset, info.length)
                tensor = torch.load(part, weights_only=True, map_location="cpu")
        except UserError:
            raise
        except Exception as error:  # torch raises many kinds for a damaged archive
            reason = one_line(error, 100) or type(error).__name__
            raise FileError(file, f"damaged ({reason})") from error
        if not isinstance(tensor, Tensor) or tensor.dtype != entry.properties.dtype or tensor.shape != piece.size:
            raise FileError(file, "damaged: a piece of a tensor does not have the size and type in the metadata")
        return tensor


class TorchDistWriter:
    """Writes tensors one after another into one file, a piece for each row of a stack; `close` writes the metadata."""

    def __init__(self, directory: Path) -> None:
        self._directory, self._name = directory, "__0_0.distcp"
        self._stream = (directory / self._name).open("wb")
        self._tensors: dict[str, TensorStorageMetadata] = {}
        self._states: dict[str, BytesStorageMetadata] = {}
        self._places: dict[MetadataIndex, _StorageInfo] = {}

    def add(self, key: str, tensor: Tensor, row: tuple[int, ...] = (), rows: tuple[int, ...] = ()) -> None:
        """Write a tensor. row: its place in the tensor `key`, which stacks `rows` of them; (): it is `key` itself."""
        piece = tensor.detach()[(None,) * len(row)]
        size, offset = torch.Size((*rows, *tensor.shape)), torch.Size((*row, *[0] * tensor.dim()))
        entry = self._tensors.setdefault(key, TensorStorageMetadata(TensorProperties(dtype=piece.dtype), size, []))
        if entry.properties.dtype != piece.dtype:
            raise UserError(f"{key}: rows of different types, {entry.properties.dtype} and {piece.dtype}")
        # Its own storage: torch.save would write all of the storage that a view looks into.
        own = piece if piece.untyped_storage().nbytes() == piece.nbytes else piece.clone()
        self._places[MetadataIndex(key, offset, len(entry.chunks))] = self._save(own)
        entry.chunks.append(ChunkStorageMetadata(offset, piece.shape))

    def add_empty_state(self, module: str, layer: int = 0, layers: int = 1) -> None:
        """Write an empty FP8 state, as Transformer Engine's layers do without FP8: megatron-core's readers need it."""
        key = f"{module}._extra_state/shard_{layer}_{layers}"
        self._states[key] = BytesStorageMetadata()
        self._places[MetadataIndex(key)] = self._save([torch.empty(0, dtype=torch.uint8)])

    def _save(self, content: Any) -> _StorageInfo:
        begin = self._stream.tell()
        torch.save(content, self._stream)
        return _StorageInfo(self._name, begin, self._stream.tell() - begin)

    def close(self) -> None:
        """Flush to disk, and write the metadata that megatron-core's readers need."""
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {**self._tensors, **self._states}
        metadata = Metadata(state_dict_metadata=entries, planner_data=None, storage_data=self._places)
        (self._directory / METADATA).write_bytes(pickle.dumps(metadata))
        (self._directory / "metadata.json").write_text(json.dumps(FORMAT))
        torch.save({}, self._directory / "common.pt")


class _Slice(io.RawIOBase):
    """A part of a file, readable as a file: torch.load then reads straight into the tensor's memory."""

    def __init__(self, stream: Any, offset: int, length: int) -> None:
        self._stream, self._offset, self._length, self._at = stream, offset, length, 0

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: max(0, self._length - self._at)]
        self._stream.seek(self._offset + self._at)
        count: int = self._stream.readinto(view)
        self._at += count
        return count

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = (0, self._at, self._length)[whence] + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True
