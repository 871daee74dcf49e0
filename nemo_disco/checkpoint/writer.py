"""Writing checkpoints: a snapshot, which is all that training waits for, then a thread that gathers, writes, hashes and
lets the checkpoint appear, over process groups that no other thread uses.

The snapshot copies the moments to the host and leaves the weights where they are: the thread writes those first, while
the next step samples, and the optimizer waits for it before it changes them. Where the host is short of memory nothing
is copied, and the optimizer waits for the moments too.

Not megatron's AsyncCallsQueue: it forks, so that a rank's sockets outlive its kill; it gathers the optimizer's state
before it returns; its persistent worker divides by the number of GPUs.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
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
from nemo_disco.checkpoint.storage import write_marks, write_shards
from nemo_disco.policy import parallel
from nemo_disco.policy.fp8_scales import sharded_scales
from nemo_disco.policy.optimizer import Optimizer
from nemo_disco.policy.optimizer_shards import Shards
from nemo_disco.policy.policy import Policy
from nemo_disco.policy.reference import Reference
from nemo_disco.runtime import host
from nemo_disco.runtime.collectives import every, first
from nemo_disco.runtime.errors import UserError

MARGIN = 2.0  # free host memory over what a copy of the moments takes
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """A policy as it is now, and what its checkpoint will say. Training may go on until the optimizer's next step."""

    step: int
    model: dict[str, Any]  # megatron's sharded tensors, of the live weights: their shapes and places alone are read
    scales: dict[str, Any]  # delayed scaling's state, by chunk
    reference: dict[str, Any]  # copies of a reference's weights, where it has moved
    optimizer: Optimizer
    copied: bool  # whether the moments are copies on the host, which the next optimizer step need not wait for
    moments: list[Shards]
    record: dict[str, Any]
    random_state: dict[str, str]

    @classmethod
    def of(cls, policy: Policy, step: int, loop_state: Mapping[str, Any], reference: Reference | None) -> Snapshot:
        """Raises TypeError for a loop_state that JSON cannot say."""
        assert policy.optimizer is not None, "a policy without an optimizer has nothing to go on with"
        state = json.loads(json.dumps(dict(loop_state)))
        policy.gather_weights()
        model = sharded_weights(policy)
        held = reference is not None and reference.moved
        scales = {str(i): sharded_scales(chunk) for i, chunk in enumerate(policy.model.chunks)}
        optimizer = policy.optimizer
        weights = reference_weights(reference) if reference is not None and held else {}
        copies = sum(t.data.nbytes for tensors in weights.values() for t in tensors.values())
        copied = host.free_memory() > MARGIN * optimizer.state_bytes + copies
        snapshot = cls(
            step=step,
            model=model,
            scales=scales,
            reference=_copies(weights),
            optimizer=optimizer,
            copied=copied,
            moments=optimizer.shards(copied=copied),
            record=checkpoint_record.identity(policy, step)
            | {"reference": held, "fp8_scales": any(scales.values()), "loop_state": state},
            random_state=checkpoint_record.random_state(),
        )
        optimizer.weights_read.clear()  # at last, when nothing can fail any more
        if not copied:
            optimizer.moments_read.clear()
        return snapshot

    def write(self, directory: Path, keep: int) -> Path:
        """Let directory/step_N appear, whole or not at all; its path. A collective of the background groups."""
        group = parallel.background_group()
        work = first(lambda: files.begin(directory, self.step), group)
        moments = self.optimizer.saved_state(self.model, self.moments)
        state = {
            "model": _detached(self.model),
            "scales": self.scales,
            "reference": self.reference,
            "optimizer": moments,
        }
        write_shards(state, work, group, self.optimizer.weights_read.set)
        self.optimizer.moments_read.set()
        first(lambda: write_marks(work), group)
        described = every(lambda: files.describe(work, dist.get_rank()), group)
        random_states = every(lambda: self.random_state, group)
        record = self.record | {
            # They are one where every rank was seeded alike, as this program does.
            "random_state": random_states if len(set(map(str, random_states))) > 1 else random_states[:1],
            "files": {name: entry for part in described for name, entry in part.items()},
        }
        final = directory / f"step_{self.step}"

        def appear() -> None:
            files.commit(work, final, record)
            files.rotate(directory, self.step, keep)

        first(appear, group)
        return final


class CheckpointWriter:
    """Saves in the background, one at a time. As a context it waits for the last one at its end."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[Path] | None = None
        self._said_short = False

    def save(
        self,
        policy: Policy,
        directory: str | Path,
        step: int,
        loop_state: Mapping[str, Any],
        keep: int,
        reference: Reference | None = None,
    ) -> None:
        """Begin to write directory/step_N, and keep the `keep` newest; the policy may change afterwards. A collective.

        loop_state: the caller's own, of JSON types; rank 0's is the one that is written. reference: saved too, if it
        has moved. Raises what `wait` does, of the save before.
        """
        self.wait()
        snapshot = Snapshot.of(policy, step, loop_state, reference)
        self._say_short(snapshot)
        self._pending = self._thread.submit(_explained, snapshot, Path(directory), keep)

    @property
    def done(self) -> bool:
        """Whether nothing is being written; this rank's word alone."""
        return self._pending is None or self._pending.done()

    @property
    def failed(self) -> bool:
        """Whether a save has ended in an error, which `wait` will raise; this rank's word alone."""
        return self._pending is not None and self.done and self._pending.exception() is not None

    def wait(self) -> None:
        """Until what was begun is complete on disk. Raises UserError if the disk refused it, RuntimeError if anything
        else failed, both naming the directory."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _say_short(self, snapshot: Snapshot) -> None:
        """Once a life, and by one rank: that the next optimizer step waits, since a host is short of memory. A
        collective."""
        short = sum(not copied for copied in every(lambda: snapshot.copied))
        if short and not self._said_short and dist.get_rank() == 0:
            log.warning(
                "step %d: %d of %d ranks have too little free memory on their host to copy the optimizer's state "
                "(%.1f GB a rank): the next optimizer step waits until the checkpoint is written (said once)",
                snapshot.step,
                short,
                dist.get_world_size(),
                snapshot.optimizer.state_bytes / 1e9,
            )
        self._said_short = self._said_short or short > 0

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.wait()
        except Exception as error:
            if kind is None:
                raise
            log.error("%s", error)  # what ended the run is the one to be raised
        finally:
            self._thread.shutdown(wait=False)


def sharded_weights(policy: Policy) -> dict[str, Any]:
    """megatron's sharded tensors of the live weights, by chunk. Byte objects stay out (torch unpickles them without
    restriction): Transformer Engine's FP8 scales are fp8_scales.py's."""
    return {
        str(i): {name: t for name, t in chunk.sharded_state_dict().items() if not isinstance(t, ShardedObject)}
        for i, chunk in enumerate(policy.model.chunks)
    }


def reference_weights(reference: Reference) -> dict[str, Any]:
    """As sharded_weights, under names that the policy's own do not take."""
    return {
        chunk: {name: replace(t, key=f"reference.{t.key}") for name, t in tensors.items()}
        for chunk, tensors in sharded_weights(reference.policy).items()
    }


def _copies(weights: dict[str, Any]) -> dict[str, Any]:
    return {
        chunk: {name: replace(t, data=t.data.detach().to("cpu", copy=True)) for name, t in tensors.items()}
        for chunk, tensors in weights.items()
    }


def _detached(weights: dict[str, Any]) -> dict[str, Any]:
    """The live weights, without their gradients; what is kept in FP8 is copied as plain numbers."""

    def plain(weight: torch.Tensor) -> torch.Tensor:
        return weight.detach() if type(weight.detach()) is torch.Tensor else weight.detach().to("cpu", copy=True)

    return {
        chunk: {name: replace(t, data=plain(t.data)) for name, t in tensors.items()}
        for chunk, tensors in weights.items()
    }


def _explained(snapshot: Snapshot, directory: Path, keep: int) -> Path:
    try:
        with torch.no_grad():
            return snapshot.write(directory, keep)
    except (Exception, CheckpointException) as error:  # torch's is a BaseException
        causes = [cause for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
        kind = UserError if all(isinstance(cause, OSError) for cause in causes) else RuntimeError
        said = "; ".join(str(cause) or repr(cause) for cause in causes)
        raise kind(f"checkpoint {directory / f'step_{snapshot.step}'} was not written: {said}") from error
    finally:
        snapshot.optimizer.weights_read.set()  # it failed before it read them: nobody will
        snapshot.optimizer.moments_read.set()


def save(policy: Policy, directory: str | Path, step: int, loop_state: Mapping[str, Any], keep: int) -> Path:
    """CheckpointWriter.save, waited for: directory/step_N."""
    with CheckpointWriter() as writer:
        writer.save(policy, directory, step, loop_state, keep)
    return Path(directory) / f"step_{step}"
