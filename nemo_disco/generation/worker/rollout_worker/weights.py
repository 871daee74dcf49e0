"""The worker's side of a refit, a transaction: begin, buckets, commit or abort. Nothing is generated during it.

Knows the wire and the names and shapes in the model directory; the engine loads the buckets.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .tensors import ALIGNMENT, ROW
from .wire import RefusedError, map_staging, product

# Number and bytes of slots: the run fills one while the engine reads another. On a GPU a slot is large enough for the
# full bandwidth; on a CPU all slots fit the processor's cache, and four spare both sides the wait for a wake-up.
_GPU_SLOTS, _CPU_SLOTS = (2, 64 << 20), (4, 2 << 20)


def expected_weights(directory: str) -> dict[str, list[int]]:
    """Shape of every weight in a Hugging Face directory by name, without lm_head if it is tied to the embeddings."""
    with open(os.path.join(directory, "config.json")) as file:
        tied = json.load(file).get("tie_word_embeddings", False)
    shapes: dict[str, list[int]] = {}
    for name in sorted(os.listdir(directory)):
        if name.endswith(".safetensors"):
            with open(os.path.join(directory, name), "rb") as weights:
                header = json.loads(weights.read(int.from_bytes(weights.read(8), "little")))
            shapes |= {key: value["shape"] for key, value in header.items() if key != "__metadata__"}
    if tied:
        shapes.pop("lm_head.weight", None)
    return shapes


def check_slots(shape: Sequence[int], directory: str, dtype: torch.dtype) -> None:
    """Raise RefusedError for slots [slots, bytes] that are more, or larger, than a model's weights can need."""
    total = _aligned([product(weight) * dtype.itemsize for weight in expected_weights(directory).values()])
    slots, size = shape
    if not (1 <= slots <= max(_GPU_SLOTS[0], _CPU_SLOTS[0]) and 1 <= size < total + ROW):
        raise RefusedError(f"refit: {slots} slots of {size:,} bytes were announced; all weights have {total:,} bytes")


def _aligned(sizes: Sequence[int]) -> int:
    """Bytes that tensors take one after another in a bucket, each of them aligned."""
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)


class RefitReceiver:
    """Receives refits into an engine. Until a full one is committed `version` is None and nothing may be generated."""

    def __init__(
        self, engine: Any, directory: str, dtype: torch.dtype, remote: bool, bucket_bytes: int | None = None
    ) -> None:
        """dtype: of the weights on the wire. remote: the run is on another machine. bucket_bytes: None for the default.
        On a GPU a bucket has room for the largest tensor in any case; on a CPU a large tensor comes in pieces."""
        self.engine, self.dtype = engine, dtype
        self.expected = expected_weights(directory)
        self.version: int | None = None
        self._target: int | None = None
        self._byte_counts: dict[str, int] = {}  # bytes so far, by name
        self._checksums: dict[str, str] = {}  # checksums of complete tensors
        sizes = [product(shape) * dtype.itemsize for shape in self.expected.values()]
        total = _aligned(sizes)
        self.slots, default_bytes = _GPU_SLOTS if engine.gpu else _CPU_SLOTS
        slot_bytes = min(total, bucket_bytes or default_bytes)
        self.slot_bytes = -(-max(slot_bytes, max(sizes) if engine.gpu else 0) // ROW) * ROW
        self._path = ""
        if not engine.gpu:
            # Unlike a file it disappears with its last user; and a container's small /dev/shm does not limit it.
            self._descriptor = os.memfd_create("nemo-disco-refit")
            os.ftruncate(self._descriptor, self.slots * self.slot_bytes)
            self._path = f"/proc/{os.getpid()}/fd/{self._descriptor}"
        ranks = engine.open_staging(self._path, (self.slots, self.slot_bytes), remote)
        kind = ("nccl" if remote else "ipc") if engine.gpu else ("inline" if remote else "shared")
        self.staging = {"kind": kind, "path": self._path, "shape": [self.slots, self.slot_bytes], "ranks": ranks}
        self._mapped: Tensor | None = None

    def begin(self, version: int) -> None:
        """Open a refit to a version of the weights, after aborting one that is still open."""
        self.abort()
        self.version, self._target, self._byte_counts, self._checksums = None, version, {}, {}
        self.engine.begin_refit()

    def load_bucket(self, slot: int, pieces: Sequence[dict[str, Any]], payload: bytearray) -> None:
        """Load a bucket: the tensors in a slot, and pieces of tensors that are larger than a slot. payload: its
        bytes if the run's machine cannot write the slot, else empty."""
        if self._target is None:
            raise RefusedError("no refit is open")
        for piece in pieces:
            self._check(piece)
        if payload:
            if self._mapped is None:
                self._mapped = map_staging(self._path, (self.slots, self.slot_bytes))
            self._mapped[slot, : len(payload)] = torch.frombuffer(payload, dtype=torch.uint8)
        dtype = str(self.dtype)[6:]
        self._checksums |= self.engine.load_bucket(
            slot, [(p["name"], dtype, p["shape"], p["offset"], p["first"], p["bytes"]) for p in pieces]
        )

    def _check(self, piece: dict[str, Any]) -> None:
        name, shape = piece["name"], piece["shape"]
        if name not in self.expected:
            raise RefusedError(f"refit: the model has no {name}")
        if shape != self.expected[name]:
            raise RefusedError(f"refit: {name} has shape {shape}, the model's is {self.expected[name]}")
        count = self._byte_counts.get(name, 0)
        if count == product(shape) * self.dtype.itemsize:
            raise RefusedError(f"refit: {name} came twice")
        if piece["first"] != count:
            raise RefusedError(f"refit: {name} continued at byte {piece['first']}, not at {count}")
        self._byte_counts[name] = count + piece["bytes"]

    def commit(self, version: int, checksums: dict[str, str]) -> None:
        """Finish the refit. checksums: the run's, by name. Raises RefusedError naming missing or damaged tensors."""
        if version != self._target:
            raise RefusedError(f"refit: commit of version {version}, but {self._target} is open")
        for fault, names in (
            ("were never sent", self.expected.keys() - checksums.keys()),
            ("were sent but did not arrive", checksums.keys() - self._checksums.keys()),
            ("arrived with other values", [n for n, c in checksums.items() if self._checksums.get(n, c) != c]),
        ):
            if names:
                examples = ", ".join(sorted(names)[:3]) + (" ..." if len(names) > 3 else "")
                raise RefusedError(f"refit: {len(names)} of {len(self.expected)} tensors {fault}: {examples}")
        self.engine.finish_refit()
        self._target, self.version = None, version

    def abort(self) -> None:
        """Abort the refit, if one is open; the engine then has no usable weights."""
        if self._target is not None:
            self._target = None
            self.engine.abort_refit()
