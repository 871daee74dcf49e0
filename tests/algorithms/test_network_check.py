"""The comparison with transformers' modules: it passes for every network, and names the module that is read wrongly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import LONG_ROPE, VARIANTS, model_config, random_rollouts, save_family, save_model

from nemo_disco.algorithms.network_check import compare_with_transformers
from nemo_disco.policy import parallel
from nemo_disco.policy.policy import Policy
from nemo_disco.runtime.errors import UserError


def build(directory: Path, dtype: torch.dtype = torch.float64, longest: int = 0) -> Policy:
    config = model_config(directory)
    parallel.start(config)
    return Policy(config, dtype=dtype, trainable=False, longest=longest)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "variant", ["qwen2-tied", "phi3-tied", "olmo2-untied", "qwen3_moe-tied", "mixtral-tied", *VARIANTS]
)
def test_every_network_agrees(variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    policy = build(save_family(tmp_path, variant), dtype)
    if policy.shape.experts and dtype is torch.bfloat16:
        with pytest.raises(UserError, match=r"rounding sends tokens to other experts.*; set verify.dtype=float32"):
            compare_with_transformers(policy, random_rollouts())
        return
    line = compare_with_transformers(policy, random_rollouts())
    assert line.startswith("11 modules agree; largest relative difference")


def _swap_gate_and_up(layers: Any) -> None:
    weight = layers[2].mlp.linear_fc1.weight
    weight.copy_(torch.cat(weight.chunk(2)[::-1]))


def _leave_out_rope(layers: Any) -> None:
    layers[1].self_attention.rope = lambda x, _: x


def _leave_out_a_bias(layers: Any) -> None:
    layers[3].self_attention.linear_proj.bias.zero_()


def _leave_out_the_gain(layers: Any) -> None:
    layers[0].pre_mlp_layernorm.weight.fill_(1.0)


@pytest.mark.parametrize(
    ("mistake", "module"),
    [
        (_swap_gate_and_up, "model.layers.2.mlp"),
        (_leave_out_rope, "model.layers.1.self_attn"),
        (_leave_out_a_bias, "model.layers.3.self_attn"),
        (_leave_out_the_gain, "model.layers.0.mlp"),
    ],
)
def test_the_first_module_that_differs_is_named(mistake: Any, module: str, tmp_path: Path) -> None:
    policy = build(save_family(tmp_path, "llama-biases"))
    with torch.no_grad():
        mistake(policy.model.chunks[0].decoder.layers)
    with pytest.raises(UserError, match=rf"differs from transformers' first in {module}: .* before it \d\.\d+e-"):
        compare_with_transformers(policy, random_rollouts())


def test_angles_that_transformers_would_not_choose_are_refused(tmp_path: Path) -> None:
    save_model(tmp_path, "qwen2", tied=True, head_dim=16, num_attention_heads=4, rope_parameters=LONG_ROPE)
    with pytest.raises(UserError, match=r"longrope has its long angles in this run .* at most 128 together"):
        compare_with_transformers(build(tmp_path, longest=129), random_rollouts())
