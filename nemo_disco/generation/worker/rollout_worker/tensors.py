"""Tensors in staging memory: their checksums, and the assembly of large tensors from pieces.

Both sides of the wire import it. Staging memory is small, so that it stays in the processor's cache; a copy's checksum
is computed while it is still there.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 64  # of a piece in its bucket, in bytes
ROW = 4096  # bytes; tensors are cut only at multiples of it


class Checksum:
    """Checksum of a tensor's bytes on any device, added in pieces of which all but the last are whole rows (ROW bytes).

    It is the sum of the rows' 64-bit words, which differs if one word differs, and a CRC-32 of the rows' sums in order
    and of the bytes after the last row. Runs at the speed of memory; the order of words inside a row does not count.
    """

    def __init__(self) -> None:
        self._rows: list[Tensor] = []  # sums, on the tensor's device: a GPU is only waited for at the end
        self._rest: Tensor | None = None

    def add(self, raw: Tensor) -> None:
        """Add the next piece, raw [bytes] uint8, contiguous."""
        if raw.data_ptr() % 8:
            raw = raw.clone()
        rest = raw.numel() % ROW
        if rest:
            raw, self._rest = raw[:-rest], raw[-rest:].clone()
        if raw.numel():
            self._rows.append(raw.view(torch.int64).view(-1, ROW // 8).sum(1))

    def __str__(self) -> str:
        rows = torch.cat(self._rows).cpu() if self._rows else torch.zeros(0, dtype=torch.int64)
        crc = zlib.crc32(rows.numpy().data)
        if self._rest is not None:
            crc = zlib.crc32(self._rest.cpu().numpy().data, crc)
        return f"{int(rows.sum()) % 2**64:016x}{crc:08x}"


def checksum(tensor: Tensor) -> str:
    """The checksum of a whole contiguous tensor."""
    total = Checksum()
    total.add(as_bytes(tensor))
    return str(total)


def as_bytes(tensor: Tensor) -> Tensor:
    """The bytes [size] uint8 of a contiguous tensor."""
    return tensor.view(-1).view(torch.uint8)


class Assembly:
    """Puts tensors together from the pieces in buckets, each in memory of its own, in the worker."""

    def __init__(self, allocate: Callable[[str, Sequence[int], torch.dtype], Tensor] | None = None) -> None:
        """allocate(name, shape, dtype): returns memory for a tensor; None for new memory on the bucket's device."""
        self._allocate = allocate
        self._open: dict[str, tuple[Tensor, Checksum]] = {}

    def take(self, bucket: Tensor, pieces: Sequence[Any]) -> Iterator[tuple[str, Tensor, str]]:
        """Yield name, tensor and checksum of each tensor that a bucket completes. bucket [bytes]; pieces: (name, dtype,
        shape, offset in the bucket, offset in the tensor, bytes) each, those of one tensor in order."""
        for name, dtype_name, shape, offset, first, count in pieces:
            if not first:
                dtype: torch.dtype = getattr(torch, dtype_name)
                if self._allocate is None:
                    tensor = torch.empty(shape, dtype=dtype, device=bucket.device)
                else:
                    tensor = self._allocate(name, shape, dtype)
                self._open[name] = tensor, Checksum()
            tensor, sums = self._open[name]
            piece = as_bytes(tensor)[first : first + count]
            piece.copy_(bucket[offset : offset + count])
            sums.add(piece)
            if first + count == tensor.nbytes:
                del self._open[name]
                yield name, tensor, str(sums)
