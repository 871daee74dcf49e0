"""Writing of checkpoints in the background. Training waits for a snapshot alone; a thread then gathers, writes, hashes
and renames, over process groups that no other thread uses.

The snapshot copies the moments to the host and refers to the live weights. The thread writes the weights first, while
the next step samples, and the optimizer waits for that before it changes them. Where the host is short of memory
nothing is copied, and the optimizer also waits until the moments are written.

megatron's AsyncCallsQueue is not used: it forks (a killed rank's sockets stay open), gathers the optimizer's state
before it returns, and its persistent worker divides by the number of GPUs.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedObject
from torch.distributed.checkpoint.api import CheckpointException

from nemo_disco.checkpoint import files
from nemo_disco.checkpoint import record as checkpoint_record
from nemo_disco.checkpoint.storage import write_format_files, write_shards
from nemo_disco.policy import parallel
from nemo_disco.policy.fp8_scales import sharded_scales
from nemo_disco.policy.optimizer import Optimizer
from nemo_disco.policy.optimizer_shards import Shards
from nemo_disco.policy.policy import Policy
from nemo_disco.policy.reference import Reference
from nemo_disco.runtime import host
from nemo_disco.runtime.collectives import is_first_rank, on_every_rank, on_first_rank
from nemo_disco.runtime.errors import UserError

MARGIN = 2.0  # the moments are copied if more than this multiple of their size is free on the host
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """The state of a policy at one step, and its checkpoint's record. Training may go on: the next optimizer step waits
    until all that it would change has been written."""

    step: int
    model: dict[str, Any]  # megatron's sharded tensors of the live weights, by chunk
    scales: dict[str, Any]  # state of FP8 delayed scaling, by chunk
    reference: dict[str, Any]  # copies of the reference's weights by chunk, if they have changed since training began
    optimizer: Optimizer
    copied: bool  # True if the moments are copies on the host, so that the next optimizer step need not wait for them
    moments: list[Shards]
    record: dict[str, Any]
    random_state: dict[str, str]

    @classmethod
    def take(cls, policy: Policy, step: int, loop_state: Mapping[str, Any], reference: Reference | None) -> Snapshot:
        """Take a snapshot of the policy. Raises TypeError for a loop_state that is not of JSON types."""
        optimizer = policy.optimizer
        assert optimizer is not None, "a policy without an optimizer has no state to resume from"
        state = json.loads(json.dumps(dict(loop_state)))
        policy.gather_weights()
        scales = {str(i): sharded_scales(chunk) for i, chunk in enumerate(policy.model.chunks)}
        weights = reference_weights(reference) if reference is not None and reference.moved else {}
        copies = sum(t.data.nbytes for tensors in weights.values() for t in tensors.values())
        copied = host.free_memory() > MARGIN * optimizer.state_bytes + copies
        snapshot = cls(
            step=step,
            model=sharded_weights(policy),
            scales=scales,
            reference=_map(weights, lambda t: replace(t, data=t.data.detach().to("cpu", copy=True))),
            optimizer=optimizer,
            copied=copied,
            moments=optimizer.shards(copied=copied),
            record=checkpoint_record.identity(policy, step)
            | {"reference": bool(weights), "fp8_scales": any(scales.values()), "loop_state": state},
            random_state=checkpoint_record.random_state(),
        )
        optimizer.weights_read.clear()  # last, when nothing can fail any more
        if not copied:
            optimizer.moments_read.clear()
        return snapshot

    def write(self, directory: Path, keep: int) -> None:
        """Write the checkpoint as directory/step_N, atomically. A collective of the background groups."""
        group = parallel.background_group()
        work = on_first_rank(lambda: files.begin(directory, self.step), group)
        moments = self.optimizer.sharded_state(self.model, self.moments)
        model = _map(self.model, lambda t: replace(t, data=_detach(t.data)))
        state = {"model": model, "scales": self.scales, "reference": self.reference, "optimizer": moments}
        write_shards(state, work, group, self.optimizer.weights_read.set)
        self.optimizer.moments_read.set()
        on_first_rank(lambda: write_format_files(work), group)
        entries = on_every_rank(lambda: files.describe(work, dist.get_rank()), group)
        random_states = on_every_rank(lambda: self.random_state, group)
        record = self.record | {
            # One state where all ranks have the same, as they do when this program seeds them.
            "random_state": random_states if len(set(map(str, random_states))) > 1 else random_states[:1],
            "files": {name: entry for of_rank in entries for name, entry in of_rank.items()},
        }

        def publish() -> None:
            files.commit(work, directory / f"step_{self.step}", record)
            files.rotate(directory, self.step, keep)

        on_first_rank(publish, group)


class CheckpointWriter:
    """Writes checkpoints in the background, one at a time; as a context manager, waits for the last one at its end."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        self._warned = False

    def save(
        self,
        policy: Policy,
        directory: str | Path,
        step: int,
        loop_state: Mapping[str, Any],
        keep: int,
        reference: Reference | None = None,
    ) -> None:
        """Begin to write directory/step_N and to remove all but the `keep` newest checkpoints. The policy may change
        once this returns. A collective.

        loop_state: the trainer's own state, of JSON types; rank 0's is written. reference: written too, if its weights
        have changed since training began. Raises the error of the previous save, as `wait` does.
        """
        self.wait()
        snapshot = Snapshot.take(policy, step, loop_state, reference)
        self._warn_of_waiting(snapshot)
        self._pending = self._thread.submit(_write, snapshot, Path(directory), keep)

    @property
    def done(self) -> bool:
        """True if this rank is not writing."""
        return self._pending is None or self._pending.done()

    @property
    def failed(self) -> bool:
        """True if this rank's last save failed and `wait` has not raised its error yet."""
        return self._pending is not None and self.done and self._pending.exception() is not None

    def wait(self) -> None:
        """Wait until the checkpoint that was begun is complete on disk. Raises UserError for an error of the disk and
        RuntimeError for any other, both naming the directory."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _warn_of_waiting(self, snapshot: Snapshot) -> None:
        """Warn, once per process, if a host lacks the memory for copies, so that training will wait. A collective."""
        short = on_every_rank(lambda: snapshot.copied).count(False)
        if short and not self._warned and is_first_rank():
            log.warning(
                "step %d: %d of %d ranks have too little free memory on their host to copy the optimizer's state "
                "(%.1f GB per rank): the next optimizer step waits until the checkpoint is written (this warning is "
                "given once)",
                *(snapshot.step, short, dist.get_world_size(), snapshot.optimizer.state_bytes / 1e9),
            )
        self._warned = self._warned or short > 0

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.wait()
        except Exception as error:
            if kind is None:
                raise
            log.error("%s", error)  # the error that ended the run is the one to raise
        finally:
            self._thread.shutdown(wait=False)


def sharded_weights(policy: Policy) -> dict[str, Any]:
    """megatron's sharded tensors of the live weights, by chunk. Without byte objects, which torch unpickles without
    restriction; fp8_scales.py saves those of Transformer Engine as tensors."""
    return {
        str(i): {name: t for name, t in chunk.sharded_state_dict().items() if not isinstance(t, ShardedObject)}
        for i, chunk in enumerate(policy.model.chunks)
    }


def reference_weights(reference: Reference) -> dict[str, Any]:
    """The sharded tensors of the reference's live weights, under keys that differ from those of the policy's."""
    return _map(sharded_weights(reference.policy), lambda t: replace(t, key=f"reference.{t.key}"))


def _map(weights: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    return {chunk: {name: change(t) for name, t in tensors.items()} for chunk, tensors in weights.items()}


def _detach(weight: torch.Tensor) -> torch.Tensor:
    """The weight itself, without its gradient; a weight in FP8 is copied to the host as plain numbers."""
    weight = weight.detach()
    return weight if type(weight) is torch.Tensor else weight.to("cpu", copy=True)


def _write(snapshot: Snapshot, directory: Path, keep: int) -> None:
    """Write the checkpoint of a snapshot. Raises UserError for an error of the disk and RuntimeError for any other."""
    try:
        with torch.no_grad():
            snapshot.write(directory, keep)
    except (Exception, CheckpointException) as error:  # torch's is a BaseException
        causes = [cause for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
        kind = UserError if all(isinstance(cause, OSError) for cause in causes) else RuntimeError
        reasons = "; ".join(str(cause) or repr(cause) for cause in causes)
        raise kind(f"checkpoint {directory / f'step_{snapshot.step}'} was not written: {reasons}") from error
    finally:  # after an error nobody reads them any more: training need not wait
        snapshot.optimizer.weights_read.set()
        snapshot.optimizer.moments_read.set()


def save(policy: Policy, directory: str | Path, step: int, loop_state: Mapping[str, Any], keep: int) -> Path:
    """Write a checkpoint and wait until it is complete on disk. Returns its path, directory/step_N."""
    with CheckpointWriter() as writer:
        writer.save(policy, directory, step, loop_state, keep)
    return Path(directory) / f"step_{step}"
