"""The engine's experts, replayed on several ranks: each layer takes its own, at every layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import model_config, random_rollouts, save_family
from torch import Tensor

from nemo_disco.policy import parallel
from nemo_disco.policy.policy import Policy

LAYOUTS = [
    {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},  # layers 1 and 3, 2 and 4
    {
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "expert_model_parallel_size": 2,
        "expert_tensor_parallel_size": 1,
    },
]


def replay(model: Path, layout: dict[str, Any]) -> tuple[Tensor, float]:
    """The log-probs over random experts, other ones in each layer, and the share that the routers would choose anew."""
    config = model_config(model, moe_router_replay="engine", **layout)
    parallel.start(config)
    policy, rollouts = Policy(config, dtype=torch.float64, temperature=0.6, with_optimizer=False), random_rollouts()
    order = torch.rand(len(rollouts.tokens), 4, 4, generator=torch.Generator().manual_seed(3)).argsort(-1)
    sampled = replace(rollouts, routes=order[..., :2].to(torch.uint8))
    routes = policy.router_replay(sampled)
    assert not isinstance(routes, str) and routes is not None
    log_probs = policy.target_values(sampled, routes=routes).log_probs
    changed = policy.accumulate(sampled, lambda _index, v: v.log_probs, routes=routes, everywhere=True)
    return log_probs, float(changed)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["pp-vpp", "tp-sp-ep"])
def test_the_engines_experts_reach_their_layers(
    layout: dict[str, Any], run_on_ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    save_family(tmp_path / "model", "qwen3_moe-untied")
    expected, changed = replay(tmp_path / "model", {})
    assert 0.5 < changed < 1
    for log_probs, own in run_on_ranks(2, replay, tmp_path / "model", layout):
        torch.testing.assert_close(log_probs, expected, rtol=0, atol=1e-10)
        assert own == pytest.approx(changed)
