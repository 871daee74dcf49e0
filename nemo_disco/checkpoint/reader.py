"""Loading of checkpoints into a policy, at any layout.

The checksums of all files are compared before any of them is opened. Every function but `latest` is a collective.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
from megatron.core import dist_checkpointing

from nemo_disco.checkpoint import files
from nemo_disco.checkpoint.record import check_fits, restore_random_state
from nemo_disco.checkpoint.storage import LoadStrategy, MetadataReader, NoCommonState
from nemo_disco.checkpoint.writer import reference_weights, sharded_weights
from nemo_disco.policy.fp8_scales import load_scales, loadable_scales
from nemo_disco.policy.policy import Policy
from nemo_disco.policy.reference import Reference
from nemo_disco.runtime.collectives import is_first_rank, on_every_rank, on_first_rank
from nemo_disco.runtime.errors import UserError

log = logging.getLogger(__name__)


def latest(directory: str | Path) -> Path | None:
    """Path of the newest complete checkpoint in a directory, or None. Its files are not checked. Not a collective."""
    return next(reversed(files.list_checkpoints(Path(directory)).values()), None)


def load(policy: Policy, path: str | Path) -> dict[str, Any]:
    """Load weights, optimizer, schedule and RNG from a checkpoint. Returns the loop_state that was saved with it.

    A policy without an optimizer gets the weights alone. Raises UserError if the checkpoint is damaged (the message
    names the file), was not written by this program, is of another model or dtype, or has weights that are not finite.
    """
    try:
        record = _check_files(Path(path))
    except files.DamagedError as damage:
        raise UserError(f"checkpoint {path}: {damage}; choose another one") from None
    return _load(policy, Path(path), record)


def load_latest(
    policy: Policy, directory: str | Path, reference: Reference | None = None
) -> tuple[int, dict[str, Any]] | None:
    """Load the newest intact checkpoint. Returns its step and loop_state, or None if there is no checkpoint.

    reference: gets the reference weights of the checkpoint, if it has any. Damaged checkpoints are skipped and named in
    the log. Raises UserError if all are damaged, or as `load` does.
    """
    on_first_rank(lambda: files.clean(Path(directory)))
    path, record, faults = newest_intact(directory)
    if path is None:
        if faults:
            raise UserError(
                f"no intact checkpoint in {directory}: {'; '.join(faults)}. To train from the start again, set "
                "exp_manager.explicit_log_dir to another directory, or remove them"
            )
        return None
    for fault in faults if is_first_rank() else []:
        log.warning("damaged checkpoint skipped: %s", fault)
    return int(record["step"]), _load(policy, path, record, reference)


def newest_intact(directory: str | Path) -> tuple[Path | None, dict[str, Any], list[str]]:
    """Path and record of the newest intact checkpoint (None and {} if there is none), and a message for each damaged
    newer one. A collective."""
    faults: list[str] = []
    for path in reversed(on_first_rank(lambda: list(files.list_checkpoints(Path(directory)).values()))):
        try:
            return path, _check_files(path), faults
        except files.DamagedError as damage:
            faults.append(f"{path}: {damage}")
    return None, {}, faults


def _check_files(path: Path) -> dict[str, Any]:
    """Compare every file of a checkpoint with its record, each rank hashing a share of them, and return the record.

    Raises DamagedError, the same on every rank.
    """
    record = on_first_rank(lambda: files.read_record(path))
    names = sorted(record["files"])
    on_every_rank(lambda: files.check(path, record["files"], names[dist.get_rank() :: dist.get_world_size()]))
    return record


def _load(policy: Policy, path: Path, record: dict[str, Any], reference: Reference | None = None) -> dict[str, Any]:
    check_fits(policy, path, record)
    reader = MetadataReader(path, record["files"])
    state: dict[str, Any] = {"model": sharded_weights(policy)}
    with_scales = policy.config.fp8 == "delayed" and record.get("fp8_scales")
    if with_scales:
        state["scales"] = {str(i): loadable_scales(chunk) for i, chunk in enumerate(policy.model.chunks)}
    if policy.optimizer is not None:
        state["optimizer"] = policy.optimizer.loadable_state(state["model"])
    if reference is not None and record.get("reference"):
        state["reference"], reference.moved = reference_weights(reference), True
    state = dist_checkpointing.load(state, str(path), LoadStrategy(reader), NoCommonState())
    for i, chunk in enumerate(policy.model.chunks):
        if with_scales:  # before the weights, which may be stored in FP8 under these scales
            load_scales(chunk, state["scales"][str(i)])
            policy.unscaled.clear()
        chunk.load_state_dict(state["model"][str(i)])
    if not policy.has_finite_weights():
        raise UserError(
            f"checkpoint {path}: some of its weights are NaN or infinite: the run that wrote it had diverged; load an "
            "earlier one (to resume this run, remove the diverged one)"
        )
    if reference is not None and "reference" in state:
        for i, chunk in enumerate(reference.policy.model.chunks):
            chunk.load_state_dict(state["reference"][str(i)])
    if policy.optimizer is not None:
        policy.optimizer.load_sharded_state(state["optimizer"], record["optimizer"]["steps"])
        states = record["random_state"]
        restore_random_state(states[policy.ranks.world if policy.ranks.world < len(states) else 0])
    return cast(dict[str, Any], record["loop_state"])
