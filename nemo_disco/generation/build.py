"""From the configuration to an engine on this rank: the policy itself, or the replicas that this rank leads."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nemo_disco.config.schema import GenerationConfig
from nemo_disco.generation.engine import Engine
from nemo_disco.generation.external.engine import ExternalEngine
from nemo_disco.generation.external.replica import Place, Replica
from nemo_disco.generation.megatron.engine import MegatronEngine
from nemo_disco.policy.policy import Policy
from nemo_disco.runtime.errors import UserError


def leads(config: GenerationConfig) -> bool:
    """Whether this rank leads replicas: the first of its node, or the first of all where replicas have own hosts."""
    return dist.get_rank() == 0 if config.nodes else int(os.environ.get("LOCAL_RANK", 0)) == 0


def build_engine(
    config: GenerationConfig, policy: Policy, stop_token_ids: Iterable[int], *, max_length: int, logs: Path
) -> Engine:
    """The engine of a run, started; a collective. logs: a directory for what the engine's processes print.

    max_length: of prompt and response, in tokens. Raises UserError if the engine cannot be built as configured.
    """
    stop = sorted(set(stop_token_ids))
    if config.engine == "megatron":
        return MegatronEngine(policy, stop)
    # float64 is the trainer's alone (nemo-disco verify)
    dtype = "bfloat16" if policy.dtype is torch.bfloat16 else "float32"
    settings: dict[str, Any] = {
        "engine": config.engine,
        "model": str(Path(policy.config.path).resolve()),
        "dtype": dtype,
        "stop_token_ids": stop,
        "vocabulary": policy.vocabulary,
        "rows": policy.rows,  # of the output; those from `vocabulary` on are no tokens
        "max_length": max_length,
        "tensor_parallel_size": config.tensor_parallel_size,
        "trust_remote_code": policy.config.trust_remote_code,
        "quantization": config.quantization,
        "sleeps": config.colocated and not config.nodes,
        "options": config.options,
    }
    places = _places(config, logs.resolve()) if leads(config) else []
    return ExternalEngine([Replica(f"engine {config.engine}, replica {p.log.stem}", p, settings) for p in places])


def _places(config: GenerationConfig, logs: Path) -> list[Place]:
    """Where each replica that this rank leads runs. Raises UserError if its GPUs are not there."""
    python = config.python
    assert python is not None
    if "/" in python and not config.nodes:
        python = os.path.abspath(python)  # not resolve(): a virtual environment's python is a link
    places = []
    hosts: list[str | None] = [*config.nodes] or [None]
    for host in hosts:
        node = host or os.environ.get("GROUP_RANK") or os.environ.get("SLURM_NODEID") or "0"
        first = 0
        if torch.cuda.is_available() and not config.colocated and host is None:
            first = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        for i in range(config.replicas):
            start = first + i * config.tensor_parallel_size
            gpus = _gpus(range(start, start + config.tensor_parallel_size), here=host is None)
            places.append(Place(python, logs / f"{node}-{i}.log", gpus, host))
    return places


def _gpus(numbers: range, here: bool) -> list[str]:
    """A replica's GPUs under CUDA's names. On this machine the numbers count what this process may use:
    CUDA_VISIBLE_DEVICES=2,3 makes GPU 0 of a run the machine's third."""
    if not torch.cuda.is_available():
        return []
    if not here:
        return [str(n) for n in numbers]
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()  # of the list, CUDA ignores what follows the first number that is no GPU
    visible = given.split(",")[:count] if given else [str(n) for n in range(count)]
    if numbers.stop > len(visible):
        wanted = "the training processes' own" if numbers.start == 0 else "those after the training processes'"
        raise UserError(
            f"a replica of the engine needs GPUs {numbers.start} to {numbers.stop - 1} of this node ({wanted}), and "
            f"this process sees {len(visible)} (CUDA_VISIBLE_DEVICES={given}): lower generation.replicas or "
            "generation.tensor_parallel_size, or give each process all GPUs of its node"
        )
    return [visible[n].strip() for n in numbers]
