"""Experts against transformers' dense computation in float64, and what of them is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dense import assert_as_dense_autograd
from tiny_models import (
    load_transformers_model,
    model_config,
    random_rollouts,
    save_family,
)

from nemo_disco.models.hf_config import read_hf_config
from nemo_disco.models.shape import read_shape
from nemo_disco.policy import parallel
from nemo_disco.policy.policy import Policy
from nemo_disco.runtime.errors import UserError

CASES = (
    "qwen3_moe-tied",
    "qwen3_moe-untied",
    "mixtral-tied",
    "mixtral-untied",
)  # of Qwen3's, one normalises weights


def build(directory: Path, **changes: Any) -> Policy:
    config = model_config(directory, **changes)
    parallel.start(config)
    return Policy(config, dtype=torch.float64, temperature=0.6, with_optimizer=False)


@pytest.mark.parametrize("granularity", [None, "full"])
@pytest.mark.parametrize("family", CASES)
def test_log_probs_and_gradient_are_those_of_dense_autograd(
    family: str, granularity: str | None, tmp_path: Path
) -> None:
    save_family(tmp_path, family)
    policy, rollouts = build(tmp_path, activations_checkpoint_granularity=granularity), random_rollouts()
    assert_as_dense_autograd(policy, tmp_path, rollouts)


def test_the_chosen_experts_are_transformers(tmp_path: Path) -> None:
    save_family(tmp_path, "qwen3_moe-tied")
    policy, model = build(tmp_path), load_transformers_model(tmp_path)
    x = torch.randn(50, 1, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    router = policy.model.chunks[0].decoder.layers[2].mlp.router
    weights, routes = router(x)
    _, scores, chosen = model.model.layers[2].mlp.gate(x[:, 0])
    assert torch.equal(routes.nonzero()[:, 1].view(50, -1), chosen.sort(-1).values)
    torch.testing.assert_close(weights.gather(1, chosen), scores, rtol=0, atol=1e-12)


def change_config(directory: Path, **changes: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 8}, r"num_experts=8 and num_local_experts=4 contradict"),
        ({"num_experts_per_tok": 5}, r"num_experts_per_tok=5 is more than num_experts=4"),
        ({"moe_intermediate_size": 0}, r"moe_intermediate_size=0 is not a whole number of at least 1"),
        ({"mlp_only_layers": [1]}, r"mlp_only_layers=\[1\] is not built, .*all layers have experts, or none"),
        ({"decoder_sparse_step": 2}, r"decoder_sparse_step=2 is not built, only 1; all layers have experts"),
        (
            {"output_router_logits": True},
            r"output_router_logits=true .* the auxiliary loss of the router is not computed",
        ),
        ({"shared_expert_intermediate_size": 8}, r"shared_expert_intermediate_size=8: not a field that is known"),
    ],
)
def test_a_field_that_makes_other_experts_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_family(tmp_path, "qwen3_moe-tied")
    change_config(tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        read_hf_config(tmp_path)


def test_a_dense_model_has_no_fields_of_experts(tmp_path: Path) -> None:
    save_family(tmp_path, "llama-tied")
    change_config(tmp_path, num_experts=4)
    with pytest.raises(UserError, match="num_experts=4: not a field that is known here"):
        read_hf_config(tmp_path)


def test_both_names_of_the_number_of_experts_are_read_and_written(tmp_path: Path) -> None:
    save_family(tmp_path, "qwen3_moe-tied")
    config = read_hf_config(tmp_path)
    assert config["num_experts"] == config["num_local_experts"] == read_shape(tmp_path).experts == 4
