"""Transformer Engine's Adam, by a stand-in, instead of torch's: checkpoints, bfloat16 moments and loaded weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fused_adam
import pytest
import torch
from tiny_models import model_config, save_model
from training import train

from nemo_disco import checkpoint
from nemo_disco.policy import parallel
from nemo_disco.policy import policy as policy_module
from nemo_disco.policy.policy import Policy


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("qwen2"), "qwen2", tied=True)


def build(path: Path, patch: pytest.MonkeyPatch, moments: str | None) -> Policy:
    """A policy with Transformer Engine's Adam, whose moments have this dtype; None: with torch's AdamW."""
    config = model_config(path)
    optim = config.optim.model_copy(update={"moments_dtype": moments or "float32"})
    config = config.model_copy(update={"optim": optim})
    parallel.start(config)
    with patch.context() as local_patch:
        if moments is not None:
            fused_adam.install_stand_in(local_patch)
            local_patch.setattr(policy_module, "uses_transformer_engine", lambda _: False)
        return Policy(config, dtype=torch.bfloat16)


def read_state(policy: Policy) -> dict[str, dict[str, torch.Tensor]]:
    """The optimizer's float32 weight and moments of each parameter, by its name."""
    assert policy.optimizer is not None
    names = {p: name for name, p in policy.model.chunks[0].named_parameters()}
    return {names[p]: tensors for part in policy.optimizer.shards(copied=True) for p, tensors in part.items()}


def assert_same(actual: Policy, expected: Policy) -> None:
    torch.testing.assert_close(read_state(actual), read_state(expected), rtol=0, atol=0)
    for (_, weight), (_, expected_weight) in zip(actual.named_weights(), expected.named_weights(), strict=True):
        assert torch.equal(weight, expected_weight)


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moments: str
) -> None:
    fused_adam.install_stand_in(monkeypatch)
    policy = build(model_path, monkeypatch, moments)
    train(policy, [1, 2])
    checkpoint.save(policy, tmp_path, 2, {}, keep=1)
    resumed = build(model_path, monkeypatch, moments)
    checkpoint.load_latest(resumed, tmp_path)
    assert_same(resumed, policy)
    for each in (policy, resumed):
        train(each, [3])
    assert_same(resumed, policy)


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_a_checkpoint_before_the_first_step_can_be_resumed(
    model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moments: str
) -> None:
    fused_adam.install_stand_in(monkeypatch)
    policy = build(model_path, monkeypatch, moments)
    checkpoint.save(policy, tmp_path, 1, {}, keep=1)
    resumed = build(model_path, monkeypatch, moments)
    checkpoint.load_latest(resumed, tmp_path)
    for each in (policy, resumed):
        train(each, [1])
    assert_same(resumed, policy)


def test_a_checkpoint_of_torchs_adam_loads_into_transformer_engines(
    model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = build(model_path, monkeypatch, None)
    train(plain, [1, 2])
    checkpoint.save(plain, tmp_path, 2, {}, keep=1)
    fused_adam.install_stand_in(monkeypatch)
    fused = build(model_path, monkeypatch, "float32")
    checkpoint.load_latest(fused, tmp_path)
    assert_same(fused, plain)


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
@pytest.mark.parametrize("trained", [False, True])
def test_the_next_step_starts_from_weights_that_were_loaded(
    model_path: Path, monkeypatch: pytest.MonkeyPatch, moments: str, trained: bool
) -> None:
    fused_adam.install_stand_in(monkeypatch)
    policy = build(model_path, monkeypatch, moments)
    if trained:
        train(policy, [1])
    doubled: dict[str, Any] = {name: 2 * w for name, w in policy.named_weights()}
    policy.load(doubled.__getitem__)
    train(policy, [2])
    for name, weight in policy.named_weights():
        torch.testing.assert_close(weight, doubled[name], rtol=0.02, atol=0.02)
