"""Overlapping communication with computation changes nothing: reducing gradients during the backward pass and gathering
weights during the forward pass gives the same weights, bit for bit, as waiting for each."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallelConfig
from tiny_models import model_config, random_rollouts, save_model
from training import fingerprint, train

from nemo_disco.generation.engine import SamplingParams
from nemo_disco.generation.megatron.engine import MegatronEngine
from nemo_disco.policy import options, parallel
from nemo_disco.policy.policy import Policy

# With megatron's own size, a tiny model has one bucket; one of this size is filled by an embedding, or by two matrices.
BUCKET_SIZE = 8000
TWO: list[dict[str, Any]] = [{}]
FOUR: list[dict[str, Any]] = [
    {"context_parallel_size": 2},
    {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    {"pipeline_model_parallel_size": 2},
    {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    {"activations_checkpoint_granularity": "full"},
]


def run_training(model: str, layout: dict[str, Any], dtype: torch.dtype, overlap: bool) -> tuple[Any, ...]:
    """Train four steps. Returns the number of buckets, and the results of all that reads the trained weights: the
    optimizer's fingerprint, log-probs [T], decoded responses, and the exported weights by name."""
    original = DistributedDataParallelConfig
    changes = {"bucket_size": BUCKET_SIZE} | ({} if overlap else {"overlap_param_gather": False})
    options.DistributedDataParallelConfig = lambda **settings: original(**settings | changes)
    config = model_config(Path(model), **layout)
    parallel.start(config)
    policy = Policy(config, dtype=dtype, total_optimizer_steps=10)
    assert any(ddp.use_forward_hook for ddp in policy.network) == overlap
    rollouts = random_rollouts(seed=9)
    train(policy, range(2))
    log_probs = policy.log_probs(rollouts)[0]
    train(policy, [2])
    responses = MegatronEngine(policy, [1]).generate([[5, 6], [7]], [1, 2], SamplingParams(1.0, 8))
    train(policy, [3])
    weights = {name: weight.clone() for name, weight in policy.named_weights()}
    buckets = sum(len(ddp.bucket_groups) for ddp in policy.network)
    return buckets, fingerprint(policy), log_probs, [r.tokens.tolist() for r in responses], weights


def compare(models: list[str], layouts: list[dict[str, Any]], dtype: torch.dtype) -> None:
    for model, layout in product(models, layouts):
        buckets, checksum, log_probs, responses, weights = run_training(model, layout, dtype, overlap=True)
        expected = run_training(model, layout, dtype, overlap=False)
        # megatron gives later pipeline stages one bucket each, since a step does not wait for their communication.
        later = parallel_state.get_pipeline_model_parallel_rank() > 0
        assert buckets > 1 or later, "there is only one bucket, so nothing can overlap"
        assert (checksum, responses) == (expected[1], expected[3]), layout
        assert torch.equal(log_probs, expected[2]), layout
        assert all(torch.equal(weight, expected[4][name]) for name, weight in weights.items()), layout


def test_two_processes(run_on_ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    models = [str(save_model(tmp_path / str(tied), "qwen2", tied=tied)) for tied in (True, False)]
    run_on_ranks(2, compare, models, TWO, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_four_processes(run_on_ranks: Callable[..., list[Any]], tmp_path: Path, dtype: torch.dtype) -> None:
    models = [str(save_model(tmp_path / str(tied), "qwen2", tied=tied)) for tied in (True, False)]
    run_on_ranks(4, compare, models, FOUR, dtype)


def generate_one(model: str) -> list[list[int]]:
    config = model_config(Path(model))
    parallel.start(config)
    policy = Policy(config, dtype=torch.float64, with_optimizer=False)
    assert any(ddp.use_forward_hook for ddp in policy.network)
    return [r.tokens.tolist() for r in MegatronEngine(policy, [1]).generate([[5, 6]], [1], SamplingParams(1.0, 8))]


def test_a_rank_without_a_question_waits_for_no_weights(run_on_ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    """A policy without an optimizer, as in verify, has forward hooks that gather weights; one rank calls none."""
    first, second = run_on_ranks(2, generate_one, str(save_model(tmp_path / "model", "qwen2", tied=True)))
    assert first == second and len(first) == 1
