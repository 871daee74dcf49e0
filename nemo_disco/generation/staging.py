"""The run's end of a replica's staging memory: where a refit writes a bucket, and what makes it arrive.

By shared memory on a CPU, CUDA IPC on the same machine's GPUs, NCCL to GPUs elsewhere, and the wire itself to a CPU
elsewhere. The two by GPU are not run: nothing here has seen one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_disco.generation.replica import Replica
from nemo_disco.generation.worker.rollout_worker.cuda import Broadcast, IpcMemory
from nemo_disco.generation.worker.rollout_worker.wire import map_staging


class Staging:
    """The slots of a replica's present process."""

    def __init__(self, replica: Replica) -> None:
        described = replica.ready["staging"]
        self.kind, shape = described["kind"], described["shape"]
        self.slots: int = shape[0]
        self.slot_bytes: int = shape[1]
        self.memories: list[Tensor]  # [slots, bytes] each; a bucket is written to all
        self._broadcast: Broadcast | None = None
        if self.kind == "shared":
            self.memories = [map_staging(described["path"], shape)]
        elif self.kind == "ipc":
            self.memories = [IpcMemory.open(rank).tensor.view(*shape) for rank in described["ranks"]]
        else:
            device = "cuda" if self.kind == "nccl" else "cpu"
            self.memories = [torch.empty(*shape, dtype=torch.uint8, device=device)]
        if self.kind == "nccl":
            unique_id, ranks = Broadcast.make_id(), 1 + len(described["ranks"])
            replica.send({"op": "join", "id": unique_id.hex(), "size": ranks})
            self._broadcast = Broadcast(unique_id, 0, ranks)
            replica.receive()

    def write(self, slot: int, offset: int, raw: Tensor) -> Tensor:
        """raw [bytes] uint8. Returns it as it lies in the slot, where a CPU still has it in its cache."""
        for memory in self.memories:
            written = memory[slot, offset : offset + raw.numel()]
            written.copy_(raw, non_blocking=True)
        return written

    def payload(self, slot: int, used: int) -> bytes | memoryview:
        """What must travel with the bucket's message."""
        if self.kind in ("ipc", "nccl"):
            torch.cuda.synchronize()  # the slot is written
        if self.kind != "inline":
            return b""
        return self.memories[0][slot, :used].numpy().data

    def sent(self, slot: int) -> None:
        """After the bucket's message: what must happen on both sides at once."""
        if self._broadcast is not None:
            self._broadcast(self.memories[0][slot])
