"""The run's end of a replica's staging memory: where a refit writes a bucket, and what makes it arrive.

By shared memory on a CPU, CUDA IPC on the same machine's GPUs, NCCL to GPUs elsewhere, and the wire itself to a CPU
elsewhere. The two by GPU are not run: nothing here has seen one.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from nemo_disco.generation.external.replica import Replica
from nemo_disco.generation.worker.rollout_worker.cuda import Broadcast, IpcMemory
from nemo_disco.generation.worker.rollout_worker.weights import check_slots
from nemo_disco.generation.worker.rollout_worker.wire import map_staging

_GPU = "cuda"  # where the slots of a broadcast are
_ABORT_S = 10.0


class Staging:
    """The slots of a replica's present process."""

    def __init__(self, replica: Replica) -> None:
        """Raises ReplicaLostError or RefusedError; the latter for more memory than the model's weights can need."""
        described = replica.ready["staging"]
        self.kind, shape = described["kind"], described["shape"]
        check_slots(shape, replica.settings["model"], getattr(torch, replica.settings["dtype"]))
        self.slots: int = shape[0]
        self.slot_bytes: int = shape[1]
        self.memories: list[Tensor]  # [slots, bytes] each; a bucket is written to all
        self._replica = replica
        self._broadcast: Broadcast | None = None
        self._opened: list[IpcMemory] = []
        if self.kind == "shared":
            self.memories = [map_staging(described["path"], shape)]
        elif self.kind == "ipc":
            self._opened = [IpcMemory.open(rank) for rank in described["ranks"]]
            self.memories = [memory.tensor.view(*shape) for memory in self._opened]
        else:
            device = _GPU if self.kind == "nccl" else "cpu"
            self.memories = [torch.empty(*shape, dtype=torch.uint8, device=device)]
        if self.kind == "nccl":
            unique_id, ranks = Broadcast.make_id(), 1 + len(described["ranks"])
            replica.send({"op": "join", "id": unique_id.hex(), "size": ranks})
            self._broadcast = replica.together(lambda: Broadcast(unique_id, 0, ranks, self.memories[0].device))
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
        """After the bucket's message: what must happen on both sides at once. Raises ReplicaLostError."""
        if self._broadcast is not None:
            broadcast, memory = self._broadcast, self.memories[0][slot]
            self._replica.together(lambda: broadcast(memory))

    def close(self) -> None:
        """After the replica's end."""
        broadcast, self._broadcast = self._broadcast, None
        if broadcast is not None:
            # Breaks off what is under way. In a thread: with peers that are gone it may hang (NVIDIA/nccl issue 863).
            leaving = threading.Thread(target=broadcast.abort, daemon=True)
            leaving.start()
            leaving.join(_ABORT_S)
        self.memories = []
        for memory in self._opened:
            memory.close()
