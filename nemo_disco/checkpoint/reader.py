"""Checkpoints of a policy: weights, optimizer, schedule, RNG and the loop's own state, in megatron-core's torch_dist
format beside a plain checkpoint.json. They load at any layout, bit for bit at the one that wrote them.

checkpoint_writer writes, this reads. Every function but `latest` is a collective. Checksums are compared before
anything is opened.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing

from nemo_disco.checkpoint import files
from nemo_disco.checkpoint.record import check_fits, restore_random_state
from nemo_disco.checkpoint.storage import LoadStrategy, MetadataReader, NothingCommon
from nemo_disco.checkpoint.writer import reference_weights, sharded_weights
from nemo_disco.policy.fp8_scales import load_scales, loadable_scales
from nemo_disco.policy.policy import Policy
from nemo_disco.policy.reference import Reference
from nemo_disco.runtime.collectives import every, first
from nemo_disco.runtime.errors import UserError

log = logging.getLogger(__name__)


def latest(directory: str | Path) -> Path | None:
    """The newest checkpoint that was written to its end; not a collective, and nothing is checked."""
    return next(reversed(files.finished(Path(directory)).values()), None)


def load(policy: Policy, path: str | Path) -> dict[str, Any]:
    """Take weights, optimizer, schedule and RNG from a checkpoint; the loop_state that was saved with it.

    A policy without an optimizer takes the weights alone. Raises UserError if the checkpoint is damaged (the file is
    named), was not written by this program, is of another model or dtype, or has weights that are not finite.
    """
    try:
        record = _intact(Path(path))
    except files.DamagedError as damage:
        raise UserError(f"checkpoint {path}: {damage}; take another one") from None
    return _load(policy, Path(path), record)


def load_latest(
    policy: Policy, directory: str | Path, reference: Reference | None = None
) -> tuple[int, dict[str, Any]] | None:
    """`load` the newest intact checkpoint: its step and loop_state, or None if there is none at all.

    reference: takes the weights of the one that was saved, if one was.
    Damaged ones are passed over and named in the log. Raises UserError if all are damaged.
    """
    first(lambda: files.clean(Path(directory)))
    path, record, damaged = newest_intact(directory)
    if path is None:
        if damaged:
            raise UserError(
                f"no intact checkpoint in {directory}: {'; '.join(damaged)}. To train from the start again, set "
                "exp_manager.explicit_log_dir to another directory, or remove them"
            )
        return None
    for said in damaged if policy.ranks.is_first else []:
        log.warning("damaged checkpoint passed over: %s", said)
    return int(record["step"]), _load(policy, path, record, reference)


def newest_intact(directory: str | Path) -> tuple[Path | None, dict[str, Any], list[str]]:
    """The newest checkpoint whose files are as they were written, its checkpoint.json, and a line for each damaged
    newer one. A collective."""
    damaged: list[str] = []
    for path in reversed(first(lambda: list(files.finished(Path(directory)).values()))):
        try:
            return path, _intact(path), damaged
        except files.DamagedError as damage:
            damaged.append(f"{path}: {damage}")
    return None, {}, damaged


def _intact(path: Path) -> dict[str, Any]:
    """The record of a checkpoint, once every file was compared with it, each rank hashing its part.

    Raises DamagedError, the same on every rank.
    """
    record = first(lambda: files.read_record(path))
    names = sorted(record["files"])
    every(lambda: files.check(path, record["files"], names[dist.get_rank() :: dist.get_world_size()]))
    return record


def _load(policy: Policy, path: Path, record: dict[str, Any], reference: Reference | None = None) -> dict[str, Any]:
    check_fits(policy, path, record)
    reader = MetadataReader(path, record["files"])
    wanted: dict[str, Any] = {"model": sharded_weights(policy)}
    scaled = policy.config.fp8 == "delayed" and record.get("fp8_scales")
    if scaled:
        wanted["scales"] = {str(i): loadable_scales(chunk) for i, chunk in enumerate(policy.model.chunks)}
    if policy.optimizer is not None:
        wanted["optimizer"] = policy.optimizer.loadable_state(wanted["model"])
    if reference is not None and record.get("reference"):
        wanted["reference"], reference.moved = reference_weights(reference), True
    state = dist_checkpointing.load(wanted, str(path), LoadStrategy(reader), NothingCommon())
    for i, chunk in enumerate(policy.model.chunks):
        if scaled:  # before the weights, which may be kept in FP8 by them
            load_scales(chunk, state["scales"][str(i)])
            policy.unscaled.clear()
        chunk.load_state_dict(state["model"][str(i)])
    if not policy.has_finite_weights():
        raise UserError(
            f"checkpoint {path}: some of its weights are NaN or infinite: the run that wrote it had diverged; take an "
            "earlier one (remove this one, where a run is to go on)"
        )
    if reference is not None and "reference" in state:
        for i, chunk in enumerate(reference.policy.model.chunks):
            chunk.load_state_dict(state["reference"][str(i)])
    if policy.optimizer is not None:
        policy.optimizer.load_sharded_state(state["optimizer"], record["optimizer"]["steps"])
        states = record["random_state"]
        restore_random_state(states[policy.ranks.world if policy.ranks.world < len(states) else 0])
    loop_state: dict[str, Any] = record["loop_state"]
    return loop_state
