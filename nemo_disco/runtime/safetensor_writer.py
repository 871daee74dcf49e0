"""Writes safetensors files tensor by tensor, with the memory of one tensor.

The shapes are known in advance, so each shard's header is written first. Touches files alone; the umask decides who may
read them (safetensors' own writer makes them readable by their owner alone).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

SHARD_BYTES = 5 * 10**9
_TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
TensorPlan = Sequence[tuple[str, tuple[int, ...], torch.dtype]]


def write_safetensors(
    directory: Path, plan: TensorPlan, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int = SHARD_BYTES
) -> None:
    """Write `tensors`, in the order of `plan` (name, shape, dtype), as model*.safetensors in shards of at most
    `shard_bytes`, with an index if there are several. Raises ValueError for a tensor that differs from the plan.
    """
    shards: list[list[tuple[str, tuple[int, ...], torch.dtype]]] = [[]]
    shard_size = 0
    for item in plan:
        size = _bytes(item[1], item[2])
        if shards[-1] and shard_size + size > shard_bytes:
            shards.append([])
            shard_size = 0
        shards[-1].append(item)
        shard_size += size
    count = len(shards)
    names = [
        f"model-{i + 1:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors" for i in range(count)
    ]
    remaining = iter(tensors)
    for file, items in zip(names, shards, strict=True):
        with (directory / file).open("wb") as stream:
            _write_shard(stream, items, remaining)
    if count > 1:
        weight_map = {name: file for file, items in zip(names, shards, strict=True) for name, *_ in items}
        total = sum(_bytes(shape, dtype) for _, shape, dtype in plan)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors by name as one file, with no memory beyond theirs. Raises OSError."""
    # The widest types first: readers want each tensor to begin at a multiple of its element's size.
    names = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    plan = [(name, tuple(tensors[name].shape), tensors[name].dtype) for name in names]
    with path.open("wb") as stream:
        _write_shard(stream, plan, ((name, tensors[name].detach().cpu()) for name in names))


def _write_shard(stream: BinaryIO, items: TensorPlan, tensors: Iterable[tuple[str, Tensor]]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape, dtype in items:
        begin, end = end, end + _bytes(shape, dtype)
        header[name] = {"dtype": _TYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    stream.write(len(text).to_bytes(8, "little") + text)
    for (name, shape, dtype), (actual, tensor) in zip(items, tensors, strict=False):
        if (actual, tuple(tensor.shape), tensor.dtype) != (name, shape, dtype):
            raise ValueError(
                f"{actual} {tuple(tensor.shape)} {tensor.dtype} came where {name} {shape} {dtype} was planned"
            )
        stream.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    if stream.tell() != 8 + len(text) + end:
        raise ValueError(f"{(stream.tell() - 8 - len(text))} bytes of tensors came where {end} were planned")
    stream.flush()
    os.fsync(stream.fileno())


def _bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize
