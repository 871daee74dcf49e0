"""The process groups: starts torch.distributed and megatron-core's layout, and gives this process's ranks in it.

The only place that initialises megatron's parallel state. gloo on CPU, NCCL on CUDA.
"""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch.distributed import HashStore, PrefixStore, TCPStore, rendezvous  # type: ignore[attr-defined]

from nemo_disco.config.schema import ModelConfig
from nemo_disco.policy import cpu_backend
from nemo_disco.runtime import srun, watchdog
from nemo_disco.runtime.watchdog import Watchdog

# A rank that has waited this long for another takes it for dead.
_TIMEOUT = datetime.timedelta(minutes=30)
_MEETING_TIMEOUT = datetime.timedelta(minutes=10)
_watchdog: Watchdog | None = None
_background: dist.ProcessGroup | None = None
_layout: dict[str, int | None] | None = None


def start(model: ModelConfig, seed: int = 0) -> None:
    """Join the process group that RANK, WORLD_SIZE, ... in the environment define (without them: one process), split it
    by the layout of `model`, and seed torch.

    May be called again in the same processes: another layout ends the previous groups, the same one keeps them.
    """
    global _background, _layout
    cpu_backend.enable()
    cuda = torch.cuda.is_available()
    if cuda:
        if model.tensor_model_parallel_size > 1:
            # Kernels then start in launch order: communication before the computation that hides it (not run).
            os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        # If the launcher shows each process only its own GPU, that GPU is number 0.
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    if not dist.is_initialized():
        parallel_state.destroy_model_parallel()  # groups of an earlier process group
        _background = None
        _join("nccl" if cuda else "gloo")
    if _background is None:
        _background = dist.new_group(timeout=_TIMEOUT, backend="gloo")
    layout: dict[str, int | None] = {
        "tensor_model_parallel_size": model.tensor_model_parallel_size,
        "pipeline_model_parallel_size": model.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": model.virtual_pipeline_model_parallel_size,
        "context_parallel_size": model.context_parallel_size,
        "expert_model_parallel_size": model.expert_model_parallel_size,
        "expert_tensor_parallel_size": model.expert_tensor_parallel_size,
    }
    if layout != _layout or not parallel_state.model_parallel_is_initialized():
        _end_groups()
        minutes = int(_TIMEOUT.total_seconds() // 60)
        parallel_state.initialize_model_parallel(**layout, distributed_timeout_minutes=minutes)
        _layout = layout
    torch.manual_seed(seed)
    if cuda:
        tensor_parallel.model_parallel_cuda_manual_seed(seed)


def stop(*, failed: bool = False) -> None:
    """Leave the process group. A failed rank leaves when its process ends: destroying the group waits for peers."""
    global _watchdog
    if failed and "RANK" in os.environ:
        watchdog.limit_clean_up()
        return
    if _watchdog is not None:
        dist.barrier()  # the ranks are watched until the last one is done
        _watchdog.stop()
        _watchdog = None
    if dist.is_initialized():
        dist.destroy_process_group()


def _end_groups() -> None:
    """End megatron-core's groups. megatron only forgets them, and a gloo group has threads that wake all the time."""
    for group in (parallel_state._global_process_group_list or [])[1:]:  # the first is the default group
        dist.destroy_process_group(group)
    parallel_state.destroy_model_parallel()


def background_group() -> dist.ProcessGroup:
    """Group of all ranks over gloo for one background thread: collectives of two threads must not mix in one group."""
    assert _background is not None, "parallel.start has not run"
    return _background


def _join(backend: str) -> None:
    """Join the default process group, and start the watchdog over its ranks."""
    global _watchdog
    if "RANK" not in os.environ:
        dist.init_process_group(backend, timeout=_TIMEOUT, store=HashStore(), rank=0, world_size=1)
        return
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    meeting = os.environ.get(srun.MEETING)
    if meeting is not None:
        store = _meet(Path(meeting), rank, world_size)
    else:
        store, rank, world_size = next(rendezvous("env://", timeout=_MEETING_TIMEOUT))
    if world_size > 1:
        _watchdog = Watchdog(cast(watchdog.Store, PrefixStore("watchdog", store)), rank, world_size)
        _watchdog.start()  # waits for all of them
    if meeting is not None and rank == 0:
        Path(meeting).unlink()
    dist.init_process_group(backend, timeout=_TIMEOUT, store=store, rank=rank, world_size=world_size)


def _meet(meeting: Path, rank: int, world_size: int) -> TCPStore:
    """A store that rank 0 serves on a free port; the other ranks read its address from the file `meeting`."""
    seconds = _MEETING_TIMEOUT.total_seconds()
    host, port = (srun.node_address(), 0) if rank == 0 else srun.wait_for_address(meeting, seconds)
    store = TCPStore(host, port, world_size, rank == 0, timeout=_MEETING_TIMEOUT, wait_for_workers=False)
    if rank == 0:
        srun.publish_address(meeting, host, store.port)
    return store


def device() -> torch.device:
    """This process's device."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


@dataclass(frozen=True)
class Ranks:
    """This process's rank and the number of ranks, overall and in each kind of parallelism.

    Data-parallel ranks read different responses; context-parallel ones share the tokens of the same responses."""

    world: int
    world_size: int
    tensor: int
    tensor_size: int
    pipeline: int
    pipeline_size: int
    data: int
    data_size: int
    context: int
    context_size: int

    @classmethod
    def here(cls) -> Ranks:
        p = parallel_state
        return cls(
            world=dist.get_rank(),
            world_size=dist.get_world_size(),
            tensor=p.get_tensor_model_parallel_rank(),
            tensor_size=p.get_tensor_model_parallel_world_size(),
            pipeline=p.get_pipeline_model_parallel_rank(),
            pipeline_size=p.get_pipeline_model_parallel_world_size(),
            data=p.get_data_parallel_rank(),
            data_size=p.get_data_parallel_world_size(),
            context=p.get_context_parallel_rank(),
            context_size=p.get_context_parallel_world_size(),
        )

    @property
    def contributes_log_probs(self) -> bool:
        """True if this rank adds its log-probs to a sum over all ranks (its TP peers have the same ones)."""
        return self.pipeline == self.pipeline_size - 1 and self.tensor == 0
