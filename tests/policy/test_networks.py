"""The networks that a config.json chooses (windows, biases, activations, ropes) against transformers, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flash
import pytest
import torch
from dense import assert_as_dense_autograd
from tiny_models import (
    LONG_ROPE,
    VARIANTS,
    YARN,
    load_transformers_model,
    model_config,
    random_rollouts,
    save_family,
    save_model,
    transformers_log_probs,
)

from nemo_disco.models.rope import Angles
from nemo_disco.policy import parallel
from nemo_disco.policy.policy import Policy
from nemo_disco.policy.rope import Rope
from nemo_disco.runtime.errors import UserError


def build(directory: Path, longest: int = 0, **changes: Any) -> Policy:
    config = model_config(directory, **changes)
    parallel.start(config)
    return Policy(config, dtype=torch.float64, temperature=0.6, with_optimizer=False, longest=longest)


@pytest.mark.parametrize("kernel", ["sdpa", "flash"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_log_probs_and_gradient_are_those_of_dense_autograd(
    variant: str, kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernel == "flash":
        flash.install_stand_in(monkeypatch)
    policy, rollouts = build(save_family(tmp_path, variant)), random_rollouts()
    assert_as_dense_autograd(policy, tmp_path, rollouts)


@pytest.mark.parametrize("longest", [128, 129])
def test_longrope_has_the_angles_of_the_runs_longest_sequence(longest: int, tmp_path: Path) -> None:
    """transformers chooses by the longest sequence of a call: here all responses are short, or all are long."""
    save_model(tmp_path, "qwen2", tied=True, head_dim=16, num_attention_heads=4, rope_parameters=LONG_ROPE)
    rollouts = random_rollouts(questions=2, group=2, longest=40)
    if longest > 128:
        tokens = torch.arange(150) % 130
        rollouts = type(rollouts).pack([[1]] * 2, [tokens, tokens.flip(0)], [[0.0] * 150] * 2, [0, 1], [False] * 2)
    expected = transformers_log_probs(load_transformers_model(tmp_path), rollouts, 0.6).detach()
    torch.testing.assert_close(build(tmp_path, longest).log_probs(rollouts)[0], expected, rtol=0, atol=1e-9)
    other = build(tmp_path, 128 + 129 - longest).log_probs(rollouts)[0]
    assert (other - expected).abs().max() > 1e-3


@pytest.mark.parametrize(
    "parameters",
    [{"attention_factor": 1.0}, {"beta_fast": 16.0, "beta_slow": 2.0}, {"mscale": 0.7, "mscale_all_dim": 0.9}],
)
def test_every_parameter_of_yarn_is_read(parameters: dict[str, float], tmp_path: Path) -> None:
    save_model(tmp_path, "qwen2", tied=True, rope_parameters=YARN | parameters)
    rollouts = random_rollouts()
    expected = transformers_log_probs(load_transformers_model(tmp_path), rollouts, 0.6).detach()
    torch.testing.assert_close(build(tmp_path).log_probs(rollouts)[0], expected, rtol=0, atol=1e-9)
    save_model(tmp_path, "qwen2", tied=True, rope_parameters=YARN)
    assert (build(tmp_path).log_probs(rollouts)[0] - expected).abs().max() > 1e-3


def test_fused_rope_is_refused_with_an_attention_factor() -> None:
    with pytest.raises(UserError, match=r"apply_rope_fusion=true: .* no attention factor, and this model's is 1.139"):
        Rope(Angles(torch.ones(4), 1.1386), torch.float32, torch.device("cpu"), fused=True)


def test_the_fused_activation_is_refused_for_another_than_swiglu(tmp_path: Path) -> None:
    save_family(tmp_path, "mistral-window")
    with pytest.raises(UserError, match=r"bias_activation_fusion=true: .* hidden_act is gelu; set it to false"):
        build(tmp_path, bias_activation_fusion=True)
