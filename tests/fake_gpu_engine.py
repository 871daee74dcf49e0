"""A worker with the engine of fake_engine.py on two ranks, which receive weights as GPUs do: by IPC or by broadcast."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from fake_engine import FakeEngine
from stand_in_gpu import SharedMemory, SocketBroadcast

RANKS = 2


class FakeGpuEngine(FakeEngine):
    """FakeEngine with two ranks, which are threads; further faults: "join", "joined" and "receive"."""

    gpu = True

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        self.ranks, self.broadcasts = ThreadPoolExecutor(RANKS), []
        self.received = 0

    def open_staging(self, path: str, shape: tuple[int, int], remote: bool) -> list[dict[str, Any]]:
        assert not path
        self.shape, size = shape, shape[0] * shape[1]
        if remote:
            self.memories = [torch.zeros(size, dtype=torch.uint8) for _ in range(RANKS)]
            return [{}] * RANKS
        shared = [SharedMemory.allocate(size, rank) for rank in range(RANKS)]
        self.memories = [memory.tensor for memory in shared]
        return [memory.describe() for memory in shared]

    def join(self, unique_id: bytes, size: int) -> None:
        self._fault("join", 0)
        assert size == 1 + RANKS
        device = torch.device("cpu")
        self.broadcasts = list(
            self.ranks.map(lambda rank: SocketBroadcast(unique_id, rank + 1, size, device), range(RANKS))
        )
        self._fault("joined", 0)

    def receive(self, slot: int) -> None:
        if not self.broadcasts:
            return
        self._fault("receive", self.received)
        self.received += 1
        slots = [memory.view(self.shape)[slot] for memory in self.memories]
        list(self.ranks.map(lambda broadcast, memory: broadcast(memory), self.broadcasts, slots))

    def load_bucket(self, slot: int, pieces: Sequence[Any]) -> dict[str, str]:
        first, *others = (memory.view(self.shape)[slot] for memory in self.memories)
        assert all(torch.equal(first, other) for other in others)
        self.slots = {slot: first.clone()}
        first.fill_(0xAA)  # nothing may rely on a slot after it was read
        for other in others:
            other.fill_(0xAA)
        return super().load_bucket(slot, pieces)


if __name__ == "__main__":
    import rollout_worker.__main__ as worker

    worker._build_engine = FakeGpuEngine
    try:
        worker.main()
    finally:
        os._exit(0)  # a rank's thread may be in a broadcast
