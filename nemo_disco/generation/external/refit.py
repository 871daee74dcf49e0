"""The run's side of a refit: copies the policy's tensors, one after another, into a replica's staging memory.

Memory is bounded: a tensor is copied once, into one of the replica's slots (in pieces if it is larger), while the
engine reads another slot. A sender stores its error instead of raising it: the stream of weights is a collective, which
every rank must read to its end.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from nemo_disco.generation.external.replica import Replica, ReplicaLostError
from nemo_disco.generation.external.staging import Staging
from nemo_disco.generation.worker.rollout_worker.tensors import ALIGNMENT, Checksum, as_bytes
from nemo_disco.generation.worker.rollout_worker.wire import RefusedError


def refit(weights: Iterable[tuple[str, Tensor]], replicas: Sequence[Replica], version: int) -> dict[int, Exception]:
    """Send the weights to the replicas. Returns the failed replicas' errors by index. Reads all of `weights`."""
    senders = [Sender(replica, version) for replica in replicas]
    for name, tensor in weights:
        for sender in senders:
            sender.add(name, tensor)
    for sender in senders:
        sender.commit()
    return {i: sender.problem for i, sender in enumerate(senders) if sender.problem is not None}


class Sender:
    """Sends the weights of one refit to one replica. problem: the first error, after which nothing more is sent."""

    def __init__(self, replica: Replica, version: int) -> None:
        self.replica, self.version = replica, version
        self.problem: Exception | None = None
        self.dtype: torch.dtype = getattr(torch, replica.settings["dtype"])
        self._checksums: dict[str, str] = {}
        self._entries: list[dict[str, Any]] = []
        self._buckets = self._used = self._unanswered = 0  # _used: bytes of the present slot
        self._guard(self._begin)

    def add(self, name: str, tensor: Tensor) -> None:
        """Send the next tensor; no reference to it is kept."""
        self._guard(self._add, name, tensor)

    def commit(self) -> None:
        """Commit after the last tensor: the engine then samples from the new weights, or `problem` is set."""
        self._guard(self._commit)

    def _guard(self, action: Any, *arguments: Any) -> None:
        if self.problem is not None:
            return
        try:
            action(*arguments)
        except (ReplicaLostError, RefusedError) as problem:
            self.problem = problem
            if isinstance(problem, RefusedError):
                self._give_up()

    def _begin(self) -> None:
        self.replica.version = None
        self.replica.call(op="begin", version=self.version)
        if self.replica.staging is None:
            self.replica.staging = Staging(self.replica)
        self.staging: Staging = self.replica.staging

    def _add(self, name: str, tensor: Tensor) -> None:
        raw, checksum = as_bytes(tensor.detach().to(self.dtype).contiguous()), Checksum()
        shape, size, slot_bytes = list(tensor.shape), raw.numel(), self.staging.slot_bytes
        if self._used + size > slot_bytes:
            self._flush()
        for first in range(0, size, slot_bytes):
            piece = raw[first : first + slot_bytes]
            checksum.add(self.staging.write(self._slot, self._used, piece))
            count = min(size - first, slot_bytes)
            entry = {"name": name, "shape": shape, "offset": self._used, "first": first, "bytes": count}
            self._entries.append(entry)
            self._used = -(-(self._used + count) // ALIGNMENT) * ALIGNMENT
            if count == slot_bytes:
                self._flush()
        self._checksums[name] = str(checksum)

    @property
    def _slot(self) -> int:
        return self._buckets % self.staging.slots

    def _flush(self) -> None:
        """Send the slot's bucket, and wait until the engine has read the next slot."""
        if not self._entries:
            return
        slot = self._slot
        payload = self.staging.payload(slot, self._used)
        self.replica.send({"op": "bucket", "slot": slot, "pieces": self._entries}, payload)
        self.staging.transfer(slot)
        self._unanswered += 1
        self._buckets += 1
        self._used, self._entries = 0, []
        while self._unanswered == self.staging.slots:
            self._receive_answer()

    def _receive_answer(self) -> None:
        self._unanswered -= 1
        self.replica.receive()

    def _commit(self) -> None:
        self._flush()
        while self._unanswered:
            self._receive_answer()
        answer = self.replica.call(op="commit", version=self.version, checksums=self._checksums)
        if answer["version"] != self.version:
            raise RefusedError(f"refit: committed version {self.version}, but the engine has {answer['version']}")
        self.replica.version = self.version

    def _give_up(self) -> None:
        """Read the answers that are still to come, then abort the refit, so that the worker accepts the next one."""
        try:
            while self._unanswered:
                try:
                    self._receive_answer()
                except RefusedError:
                    continue
            self.replica.call(op="abort")
        except (ReplicaLostError, RefusedError) as problem:
            self.problem = problem
