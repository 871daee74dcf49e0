"""The refit as a transaction: begin, buckets, commit or abort. Between begin and commit nothing may be generated.

Knows the wire and the model directory's names and shapes; what an engine does with a bucket is the engine's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .wire import ALIGNMENT, RefusedError, map_staging, product

BUCKET_BYTES = 64 << 20


def expected_weights(directory: str) -> dict[str, list[int]]:
    """Name and shape of every weight of a Hugging Face directory, from the safetensors headers."""
    with open(os.path.join(directory, "config.json")) as file:
        tied = json.load(file).get("tie_word_embeddings", False)
    found: dict[str, list[int]] = {}
    for name in sorted(os.listdir(directory)):
        if name.endswith(".safetensors"):
            with open(os.path.join(directory, name), "rb") as weights:
                header = json.loads(weights.read(int.from_bytes(weights.read(8), "little")))
            found |= {key: value["shape"] for key, value in header.items() if key != "__metadata__"}
    if tied:
        found.pop("lm_head.weight", None)
    return found


class Weights:
    """The refit's transaction. `version` is None, and nothing may be generated, until a full refit is committed."""

    def __init__(self, engine: Any, directory: str, dtype: torch.dtype, bucket_bytes: int, remote: bool) -> None:
        """dtype: what the weights come in. A bucket is `bucket_bytes`, or the largest tensor. remote: the run is on
        another machine."""
        self.engine, self.dtype = engine, dtype
        self.expected = expected_weights(directory)
        self.version: int | None = None
        self._target: int | None = None
        self._received: dict[str, str] = {}
        largest = max(product(shape) for shape in self.expected.values()) * dtype.itemsize
        total = sum(-(-product(s) * dtype.itemsize // ALIGNMENT) * ALIGNMENT for s in self.expected.values())
        self.slot_bytes = -(-max(largest, min(total, bucket_bytes)) // ALIGNMENT) * ALIGNMENT
        # Two slots: the run fills one while the engine reads the other.
        self._path = ""
        if not engine.gpu:
            # Unlike a file it is gone with its last user, and a container's small /dev/shm does not bound it.
            self._descriptor = os.memfd_create("nemo-disco-refit")
            os.ftruncate(self._descriptor, 2 * self.slot_bytes)
            self._path = f"/proc/{os.getpid()}/fd/{self._descriptor}"
        opened = engine.open_staging(self._path, self.slot_bytes, remote)
        kind = ("nccl" if remote else "ipc") if engine.gpu else ("inline" if remote else "shared")
        self.staging = {"kind": kind, "path": self._path, "ranks": opened}
        self._own: Tensor | None = None

    def begin(self, version: int) -> None:
        self.abort()
        self.version, self._target, self._received = None, version, {}
        self.engine.begin_refit()

    def bucket(self, slot: int, tensors: Sequence[dict[str, Any]], payload: bytearray) -> None:
        """Take the tensors that lie in a slot (or came as `payload`, from a machine that cannot reach the slot)."""
        if self._target is None:
            raise RefusedError("no refit is open")
        for entry in tensors:
            name, shape = entry["name"], entry["shape"]
            if name not in self.expected:
                raise RefusedError(f"refit: the model has no {name}")
            if shape != self.expected[name]:
                raise RefusedError(f"refit: {name} has shape {shape}, the model's is {self.expected[name]}")
            if name in self._received:
                raise RefusedError(f"refit: {name} came twice")
        if payload:
            if self._own is None:
                self._own = map_staging(self._path, 2 * self.slot_bytes)
            self._own[slot * self.slot_bytes :][: len(payload)] = torch.frombuffer(payload, dtype=torch.uint8)
        placed = [(e["name"], str(self.dtype)[6:], e["shape"], e["offset"]) for e in tensors]
        found = self.engine.load_bucket(slot, placed)
        self._received |= dict(zip([e["name"] for e in tensors], found, strict=True))

    def commit(self, version: int, checksums: dict[str, str]) -> None:
        if version != self._target:
            raise RefusedError(f"refit: commit of version {version}, but {self._target} is open")
        for words, names in (
            ("were never sent", self.expected.keys() - checksums.keys()),
            ("were sent but did not arrive", checksums.keys() - self._received.keys()),
            ("arrived with other values", [n for n, c in checksums.items() if self._received.get(n, c) != c]),
        ):
            if names:
                listed = ", ".join(sorted(names)[:3]) + (" ..." if len(names) > 3 else "")
                raise RefusedError(f"refit: {len(names)} of {len(self.expected)} tensors {words}: {listed}")
        self.engine.finish_refit()
        self._target, self.version = None, version

    def abort(self) -> None:
        """Leave an open refit; the engine has no usable weights then."""
        if self._target is not None:
            self._target = None
            self.engine.abort_refit()
