"""Checkpoints of a policy: weights, optimizer, schedule, RNG and the loop's own state, in megatron-core's torch_dist
format beside a plain checkpoint.json. They load at any layout, bit for bit at the one that wrote them.

Every function but `latest` is a collective. Checksums are compared before anything is opened.
"""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import megatron.core
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedObject

import nemo_disco
from nemo_disco.policy import checkpoint_files as files
from nemo_disco.policy.checkpoint_storage import LoadStrategy, MetadataReader, NothingCommon, SaveStrategy
from nemo_disco.policy.policy import Policy
from nemo_disco.runtime.errors import UserError

log = logging.getLogger(__name__)
T = TypeVar("T")

# What makes a checkpoint one of this model: megatron's names, and Hugging Face's.
_SHAPE = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "add_qkv_bias",
    "layernorm_epsilon",
)
_KIND = ("model_type", "vocab_size", "tie_word_embeddings", "rope_parameters")


def save(policy: Policy, directory: str | Path, step: int, loop_state: Mapping[str, Any], keep: int) -> Path:
    """Write directory/step_N, whole or not at all, and keep the `keep` newest; its path. A collective.

    loop_state: the caller's own, of JSON types; rank 0's is the one that is written.
    """
    assert policy.optimizer is not None, "a policy without an optimizer has nothing to go on with"
    directory = Path(directory)
    state = json.loads(json.dumps(dict(loop_state)))  # what JSON cannot say is refused before anything is written
    work = _first(lambda: files.begin(directory, step))
    dist_checkpointing.save(_sharded_state(policy, loading=False), str(work), SaveStrategy())
    described = _every(lambda: files.describe(work, policy.ranks.world))
    random_states = _every(_random_state)
    record = _identity(policy, step) | {
        "loop_state": state,
        # They are one where every rank was seeded alike, as this program does.
        "random_state": random_states if len(set(map(str, random_states))) > 1 else random_states[:1],
        "files": {name: entry for part in described for name, entry in part.items()},
    }
    final = directory / f"step_{step}"

    def appear() -> None:
        files.commit(work, final, record)
        files.rotate(directory, step, keep)

    _first(appear)
    return final


def latest(directory: str | Path) -> Path | None:
    """The newest checkpoint that was written to its end; not a collective, and nothing is checked."""
    return next(reversed(files.finished(Path(directory)).values()), None)


def load(policy: Policy, path: str | Path) -> dict[str, Any]:
    """Take weights, optimizer, schedule and RNG from a checkpoint; the loop_state that was saved with it.

    A policy without an optimizer takes the weights alone. Raises UserError if the checkpoint is damaged (the file is
    named), was not written by this program, or is of another model or dtype.
    """
    try:
        record = _intact(Path(path))
    except files.DamagedError as damage:
        raise UserError(f"checkpoint {path}: {damage}; take another one") from None
    return _load(policy, Path(path), record)


def load_latest(policy: Policy, directory: str | Path) -> tuple[int, dict[str, Any]] | None:
    """`load` the newest intact checkpoint: its step and loop_state, or None if there is none at all.

    Damaged ones are passed over and named in the log. Raises UserError if all are damaged.
    """
    _first(lambda: files.clean(Path(directory)))
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
    return int(record["step"]), _load(policy, path, record)


def newest_intact(directory: str | Path) -> tuple[Path | None, dict[str, Any], list[str]]:
    """The newest checkpoint whose files are as they were written, its checkpoint.json, and a line for each damaged
    newer one. A collective."""
    damaged: list[str] = []
    for path in reversed(_first(lambda: list(files.finished(Path(directory)).values()))):
        try:
            return path, _intact(path), damaged
        except files.DamagedError as damage:
            damaged.append(f"{path}: {damage}")
    return None, {}, damaged


def _intact(path: Path) -> dict[str, Any]:
    """The record of a checkpoint, once every file was compared with it, each rank hashing its part.

    Raises DamagedError, the same on every rank.
    """
    record = _first(lambda: files.read_record(path))
    names = sorted(record["files"])
    _every(lambda: files.check(path, record["files"], names[dist.get_rank() :: dist.get_world_size()]))
    return record


def _load(policy: Policy, path: Path, record: dict[str, Any]) -> dict[str, Any]:
    _check_fits(policy, path, record)
    reader = MetadataReader(path, record["files"])
    state = dist_checkpointing.load(
        _sharded_state(policy, loading=True), str(path), LoadStrategy(reader), NothingCommon()
    )
    for i, chunk in enumerate(policy.model.chunks):
        chunk.load_state_dict(state["model"][str(i)])
    if policy.optimizer is not None:
        policy.optimizer.load_sharded_state(state["optimizer"], record["optimizer"]["steps"])
        states = record["random_state"]
        _restore_random_state(states[policy.ranks.world if policy.ranks.world < len(states) else 0])
    loop_state: dict[str, Any] = record["loop_state"]
    return loop_state


def _sharded_state(policy: Policy, *, loading: bool) -> dict[str, Any]:
    """megatron's sharded tensors of weights and optimizer. Byte objects (Transformer Engine's FP8 scales) stay out:
    torch unpickles them without restriction."""
    model = {
        str(i): {name: t for name, t in chunk.sharded_state_dict().items() if not isinstance(t, ShardedObject)}
        for i, chunk in enumerate(policy.model.chunks)
    }
    if policy.optimizer is None:
        return {"model": model}
    return {"model": model, "optimizer": policy.optimizer.sharded_state(model, loading=loading)}


# --- what a checkpoint says of itself ---


def _identity(policy: Policy, step: int) -> dict[str, Any]:
    ranks, config = policy.ranks, policy.config
    assert policy.optimizer is not None
    return {
        "format": files.FORMAT,
        "step": step,
        "code": {
            "nemo_disco": nemo_disco.__version__,
            "torch": torch.__version__,
            "megatron_core": megatron.core.__version__,
        },
        "layout": {
            "tensor_model_parallel_size": ranks.tensor_size,
            "pipeline_model_parallel_size": ranks.pipeline_size,
            "virtual_pipeline_model_parallel_size": config.virtual_pipeline_model_parallel_size,
            "context_parallel_size": ranks.context_size,
            "sequence_parallel": config.sequence_parallel,
            "data_parallel_size": ranks.data_size,
        },
        "dtype": _dtype(policy),
        "optimizer": {"name": config.optim.name, "steps": policy.optimizer.steps},
        "model": _architecture(policy),
    }


def _architecture(policy: Policy) -> dict[str, Any]:
    config = policy.model.bridge.config
    shape = {name: getattr(config, name) for name in _SHAPE}
    kind = {name: getattr(policy.hf_config, name) for name in _KIND}
    said: dict[str, Any] = json.loads(json.dumps(kind | shape))
    return said


def _dtype(policy: Policy) -> str:
    return str(policy.model.bridge.config.params_dtype).removeprefix("torch.")


def _check_fits(policy: Policy, path: Path, record: dict[str, Any]) -> None:
    if record["format"] > files.FORMAT:
        raise UserError(f"checkpoint {path} was written by a newer version: {record['code']}")
    there = record["model"]
    differ = [
        f"{name} is {there.get(name)} there and {value} here"
        for name, value in _architecture(policy).items()
        if there.get(name) != value
    ]
    if differ:
        raise UserError(
            f"checkpoint {path} is of another model than {policy.config.path}: {'; '.join(differ)}; set model.path to "
            "that model, or exp_manager.explicit_log_dir to another directory"
        )
    written, ours = record["dtype"], _dtype(policy)
    if policy.optimizer is not None and written != ours:
        raise UserError(
            f"checkpoint {path} was written with dtype {written}, this run has {ours}: set trainer.precision as it "
            "was, or start another run from its export"
        )


def _random_state() -> dict[str, str]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return {device: base64.b64encode(s.numpy().tobytes()).decode() for device, s in state.items()}


def _restore_random_state(state: dict[str, str]) -> None:
    restore = {"cpu": torch.set_rng_state, "cuda": torch.cuda.set_rng_state}
    for device, said in state.items():
        if device == "cpu" or torch.cuda.is_available():
            restore[device](torch.frombuffer(bytearray(base64.b64decode(said)), dtype=torch.uint8))


# --- the same outcome on every rank ---


def _every(do: Callable[[], T]) -> list[T]:
    """What `do` returns on each rank, on every rank. What it raises anywhere is raised everywhere: a rank that fails
    alone would leave the others waiting."""
    mine: tuple[T | None, Exception | None]
    try:
        mine = do(), None
    except Exception as error:
        mine = None, error
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, mine)
    for rank, (_, failure) in enumerate(outcomes):
        if failure is not None:
            raise (rank == dist.get_rank() and mine[1]) or failure  # its own has the traceback
    return [value for value, _ in outcomes]


def _first(do: Callable[[], T]) -> T:
    """What `do` returns, or raises, on rank 0; it is done there alone."""
    return _every(lambda: do() if dist.get_rank() == 0 else None)[0]  # type: ignore[return-value]
