"""The run's side of a refit: the policy's tensors, one after the other, into a replica's staging memory.

Bounded memory: a tensor is copied once, into one of the replica's two slots (in pieces if it is larger), while the
engine reads the other. A sender never raises: it remembers its problem, for the stream of weights is a collective and
must run to its end.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from nemo_disco.generation.replica import Replica, ReplicaLostError
from nemo_disco.generation.staging import Staging
from nemo_disco.generation.worker.rollout_worker.tensors import ALIGNMENT, Checksum, as_bytes
from nemo_disco.generation.worker.rollout_worker.wire import RefusedError


def refit(weights: Iterable[tuple[str, Tensor]], replicas: Sequence[Replica], version: int) -> dict[int, Exception]:
    """Give the weights to the replicas; the problems, by the replica's place in the list. Reads all of `weights`."""
    senders = [Sender(replica, version) for replica in replicas]
    for name, tensor in weights:
        for sender in senders:
            sender.add(name, tensor)
    for sender in senders:
        sender.commit()
    return {i: sender.problem for i, sender in enumerate(senders) if sender.problem is not None}


class Sender:
    """One refit of one replica."""

    def __init__(self, replica: Replica, version: int) -> None:
        self.replica, self.version = replica, version
        self.problem: Exception | None = None
        self.dtype: torch.dtype = getattr(torch, replica.settings["dtype"])
        self._checksums: dict[str, str] = {}
        self._entries: list[dict[str, Any]] = []
        self._buckets = self._used = self._unanswered = 0
        self._guarded(self._begin)

    def add(self, name: str, tensor: Tensor) -> None:
        """The next tensor. Nothing of it is kept."""
        self._guarded(self._add, name, tensor)

    def commit(self) -> None:
        """After the last tensor: the weights serve from here on, or `problem` is set."""
        self._guarded(self._commit)

    def _guarded(self, part: Any, *arguments: Any) -> None:
        if self.problem is not None:
            return
        try:
            part(*arguments)
        except (ReplicaLostError, RefusedError) as problem:
            self.problem = problem
            if isinstance(problem, RefusedError):
                self._give_up()

    def _begin(self) -> None:
        self.replica.version = None
        self.replica.ask(op="begin", version=self.version)
        if self.replica.staging is None:
            self.replica.staging = Staging(self.replica)
        self.staging: Staging = self.replica.staging
        self.slot_bytes = self.staging.slot_bytes

    def _add(self, name: str, tensor: Tensor) -> None:
        raw, seen = as_bytes(tensor.detach().to(self.dtype).contiguous()), Checksum()
        if self._used + len(raw) > self.slot_bytes:
            self._flush()
        for first in range(0, len(raw), self.slot_bytes):
            piece = raw[first : first + self.slot_bytes]
            self._place(name, list(tensor.shape), first, piece)
            seen.add(piece)
            if len(piece) == self.slot_bytes:
                self._flush()
        self._checksums[name] = str(seen)

    def _place(self, name: str, shape: list[int], first: int, piece: Tensor) -> None:
        """The bytes of a tensor from `first` on behind what is in the slot."""
        self.staging.write(self._buckets % 2, self._used, piece)
        entry = {"name": name, "shape": shape, "offset": self._used, "first": first, "bytes": len(piece)}
        self._entries.append(entry)
        self._used = -(-(self._used + len(piece)) // ALIGNMENT) * ALIGNMENT

    def _flush(self) -> None:
        """Hand the slot over, and wait until the other one has been read."""
        if not self._entries:
            return
        slot = self._buckets % 2
        payload = self.staging.payload(slot, self._used)
        self.replica.send({"op": "bucket", "slot": slot, "pieces": self._entries}, payload)
        self.staging.sent(slot)
        self._unanswered += 1
        self._buckets += 1
        self._used, self._entries = 0, []
        while self._unanswered > 1:
            self._answer()

    def _answer(self) -> None:
        self._unanswered -= 1
        self.replica.receive()

    def _commit(self) -> None:
        self._flush()
        while self._unanswered:
            self._answer()
        answer = self.replica.ask(op="commit", version=self.version, checksums=self._checksums)
        if answer["version"] != self.version:
            raise RefusedError(f"refit: committed version {self.version}, the engine says {answer['version']}")
        self.replica.version = self.version

    def _give_up(self) -> None:
        """Abort, so that the worker is ready for the next begin; answers under way are read first."""
        try:
            while self._unanswered:
                try:
                    self._answer()
                except RefusedError:
                    continue
            self.replica.ask(op="abort")
        except (ReplicaLostError, RefusedError) as problem:
            self.problem = problem
