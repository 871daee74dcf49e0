"""Builds the configured engine on this rank: on the policy itself, or as the client of the rank's replicas."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from nemo_disco.config.schema import GenerationConfig
from nemo_disco.generation.engine import Engine
from nemo_disco.generation.external.engine import ExternalEngine
from nemo_disco.generation.external.replica import Place, Replica
from nemo_disco.generation.megatron.engine import MegatronEngine
from nemo_disco.policy.policy import Policy
from nemo_disco.runtime.collectives import is_first_rank
from nemo_disco.runtime.errors import UserError


def leads_replicas(config: GenerationConfig) -> bool:
    """True if this rank leads replicas: the first rank of its node, or rank 0 if generation.nodes names other hosts."""
    return is_first_rank() if config.nodes else int(os.environ.get("LOCAL_RANK", 0)) == 0


def build_engine(
    config: GenerationConfig, policy: Policy, stop_token_ids: Iterable[int], *, max_length: int, logs: Path
) -> Engine:
    """Build and start the engine of a run. A collective.

    max_length: of prompt and response together, in tokens. logs: directory for the output of the engine's processes.
    Raises UserError if the engine cannot be built as configured.
    """
    stop = sorted(set(stop_token_ids))
    if config.engine == "megatron":
        return MegatronEngine(policy, stop)
    # only the policy computes in float64 (nemo-disco verify)
    dtype = "bfloat16" if policy.dtype is torch.bfloat16 else "float32"
    settings: dict[str, Any] = {
        "engine": config.engine,
        "model": str(Path(policy.config.path).resolve()),
        "dtype": dtype,
        "stop_token_ids": stop,
        "vocabulary": policy.vocabulary,
        "rows": policy.rows,  # of the output layer; those from `vocabulary` on are padding
        "max_length": max_length,
        "tensor_parallel_size": config.tensor_parallel_size,
        "trust_remote_code": policy.config.trust_remote_code,
        "quantization": config.quantization,
        "routes": policy.config.moe_router_replay == "engine",
        "sleeps": config.colocated and not config.nodes,
        "options": config.options,
    }
    places = _places(config, logs.resolve()) if leads_replicas(config) else []
    return ExternalEngine([Replica(f"engine {config.engine}, replica {p.log.stem}", p, settings) for p in places])


def _places(config: GenerationConfig, logs: Path) -> list[Place]:
    """The place of each replica that this rank leads. Raises UserError if this node has too few GPUs for them."""
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
            gpus = _gpu_names(range(start, start + config.tensor_parallel_size), on_this_node=host is None)
            places.append(Place(python, logs / f"{node}-{i}.log", gpus, host))
    return places


def _gpu_names(numbers: range, on_this_node: bool) -> list[str]:
    """A replica's GPUs as CUDA_VISIBLE_DEVICES names them. On this node `numbers` are positions among the GPUs that
    this process may use: with CUDA_VISIBLE_DEVICES=2,3, number 0 is the machine's third GPU."""
    if not torch.cuda.is_available():
        return []
    if not on_this_node:
        return [str(n) for n in numbers]
    variable = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()  # CUDA ignores the rest of the list after the first number that is no GPU
    visible = variable.split(",")[:count] if variable else [str(n) for n in range(count)]
    if numbers.stop > len(visible):
        position = "the training processes' own" if numbers.start == 0 else "those after the training processes'"
        raise UserError(
            f"a replica of the engine needs GPUs {numbers.start} to {numbers.stop - 1} of this node ({position}), and "
            f"this process sees {len(visible)} (CUDA_VISIBLE_DEVICES={variable}): lower generation.replicas or "
            "generation.tensor_parallel_size, or give each process all GPUs of its node"
        )
    return [visible[n].strip() for n in numbers]
