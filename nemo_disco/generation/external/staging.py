"""The run's access to a replica's staging memory, into which a refit writes its buckets.

Shared memory with a CPU of this machine, CUDA IPC with its GPUs; NCCL to GPUs of other machines, the wire to their
CPUs. CUDA IPC and NCCL have not been run: they need GPUs.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from nemo_disco.generation.external.replica import Replica
from nemo_disco.generation.worker.rollout_worker.cuda import Broadcast, IpcMemory
from nemo_disco.generation.worker.rollout_worker.weights import check_slots
from nemo_disco.generation.worker.rollout_worker.wire import map_staging

_GPU = "cuda"  # device of a broadcast's slots
_ABORT_S = 10.0


class Staging:
    """The staging slots of a replica's present process."""

    def __init__(self, replica: Replica) -> None:
        """Open the slots that the worker announced. Raises ReplicaLostError, or RefusedError if they are larger than
        the model's weights can need."""
        description = replica.ready["staging"]
        self.kind, shape = description["kind"], description["shape"]
        check_slots(shape, replica.settings["model"], getattr(torch, replica.settings["dtype"]))
        self.slots: int = shape[0]
        self.slot_bytes: int = shape[1]
        self.memories: list[Tensor]  # [slots, bytes] each; a bucket is written to all of them
        self._replica = replica
        self._broadcast: Broadcast | None = None
        self._ipc_memories: list[IpcMemory] = []
        if self.kind == "shared":
            self.memories = [map_staging(description["path"], shape)]
        elif self.kind == "ipc":
            self._ipc_memories = [IpcMemory.open(rank) for rank in description["ranks"]]
            self.memories = [memory.tensor.view(*shape) for memory in self._ipc_memories]
        else:
            device = _GPU if self.kind == "nccl" else "cpu"
            self.memories = [torch.empty(*shape, dtype=torch.uint8, device=device)]
        if self.kind == "nccl":
            unique_id, ranks = Broadcast.make_id(), 1 + len(description["ranks"])
            replica.send({"op": "join", "id": unique_id.hex(), "size": ranks})
            self._broadcast = replica.run_collective(lambda: Broadcast(unique_id, 0, ranks, self.memories[0].device))
            replica.receive()

    def write(self, slot: int, offset: int, raw: Tensor) -> Tensor:
        """Copy raw [bytes] uint8 into the slot. Returns the copy, which a CPU still has in its cache."""
        for memory in self.memories:
            copy = memory[slot, offset : offset + raw.numel()]
            copy.copy_(raw, non_blocking=True)
        return copy

    def payload(self, slot: int, used: int) -> bytes | memoryview:
        """The bytes for the bucket's message: those of the slot if the worker cannot read it, otherwise none."""
        if self.kind in ("ipc", "nccl"):
            torch.cuda.synchronize()  # until the slot is written
        if self.kind != "inline":
            return b""
        return self.memories[0][slot, :used].numpy().data

    def transfer(self, slot: int) -> None:
        """After the bucket's message: broadcast the slot to ranks on other machines. Raises ReplicaLostError."""
        if self._broadcast is not None:
            broadcast, memory = self._broadcast, self.memories[0][slot]
            self._replica.run_collective(lambda: broadcast(memory))

    def close(self) -> None:
        """Free the slots, after the replica's process has ended."""
        broadcast, self._broadcast = self._broadcast, None
        if broadcast is not None:
            # In a thread: an abort may hang when the peers are gone (NVIDIA/nccl issue 863).
            abort = threading.Thread(target=broadcast.abort, daemon=True)
            abort.start()
            abort.join(_ABORT_S)
        self.memories = []
        for memory in self._ipc_memories:
            memory.close()
