"""Tensors on their way through staging memory: their checksums, and putting the pieces of large ones together.

Both sides of the wire import it. Staging memory is small, so that it stays in the processor's cache; what was copied is
summed while it is there too.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 64  # of a piece in its bucket, in bytes
ROW = 4096  # bytes; a tensor is cut at multiples of it alone


class Checksum:
    """Of a tensor's bytes on any device, given in pieces of which all but the last are whole rows.

    The sum of its 64-bit words, which any one changed word changes, and a CRC-32 of the sums of its rows in order and
    of what is left behind the last row. At the speed of memory; only the order of words inside a row does not count.
    """

    def __init__(self) -> None:
        self._rows: list[Tensor] = []  # sums, where the tensor is: a GPU is not waited for until the end
        self._rest: Tensor | None = None

    def add(self, raw: Tensor) -> None:
        """raw [bytes] uint8, contiguous: the next piece."""
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
    """Of a whole contiguous tensor."""
    found = Checksum()
    found.add(as_bytes(tensor))
    return str(found)


def as_bytes(tensor: Tensor) -> Tensor:
    """The bytes [size] uint8 of a contiguous tensor."""
    return tensor.view(-1).view(torch.uint8)


class Assembly:
    """The receiving side: tensors put together from the pieces in buckets, in memory of their own."""

    def __init__(self, allocate: Callable[[str, Sequence[int], torch.dtype], Tensor] | None = None) -> None:
        """allocate(name, shape, dtype): the memory for a tensor; without it, new memory on the bucket's device."""
        self._allocate = allocate
        self._open: dict[str, tuple[Tensor, Checksum]] = {}

    def take(self, bucket: Tensor, pieces: Sequence[Any]) -> Iterator[tuple[str, Tensor, str]]:
        """The tensors that a bucket completes: name, tensor, checksum. bucket: bytes; pieces: (name, dtype, shape,
        offset in the bucket, offset in the tensor, bytes) each, of one tensor in order."""
        for name, kind, shape, offset, first, count in pieces:
            if not first:
                dtype: torch.dtype = getattr(torch, kind)
                if self._allocate is None:
                    tensor = torch.empty(shape, dtype=dtype, device=bucket.device)
                else:
                    tensor = self._allocate(name, shape, dtype)
                self._open[name] = tensor, Checksum()
            tensor, seen = self._open[name]
            own = as_bytes(tensor)[first : first + count]
            own.copy_(bucket[offset : offset + count])
            seen.add(own)
            if first + count == tensor.nbytes:
                del self._open[name]
                yield name, tensor, str(seen)
