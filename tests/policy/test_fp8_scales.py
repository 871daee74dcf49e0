"""FP8 with delayed scaling: its state is in checkpoints, and the first pass is as precise as the following ones. The
layers are stand-ins for Transformer Engine's in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import fused_layers
import pytest
import torch
from tiny_models import model_config, random_rollouts, save_model
from training import fingerprint, train

from nemo_disco import checkpoint
from nemo_disco.policy import layers, parallel
from nemo_disco.policy import policy as policy_module
from nemo_disco.policy.policy import Policy


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("qwen2"), "qwen2", tied=False)


@pytest.fixture
def build(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Policy]:
    monkeypatch.setattr(layers, "_transformer_engine_layer", fused_layers.fused_layer)
    monkeypatch.setattr(policy_module, "uses_transformer_engine", lambda _: True)

    def make() -> Policy:
        config = model_config(model_path, fp8="delayed", token_budget=64)
        parallel.start(config)
        return Policy(config)

    return make


def test_a_resumed_run_has_the_scales_of_the_saved_one(build: Callable[[], Policy], tmp_path: Path) -> None:
    policy = build()
    train(policy, [1, 2])
    checkpoint.save(policy, tmp_path, 2, {}, keep=1)
    expected = policy.log_probs(random_rollouts())[0]
    resumed = build()
    checkpoint.load_latest(resumed, tmp_path)
    assert torch.equal(resumed.log_probs(random_rollouts())[0], expected)
    for each in (policy, resumed):
        train(each, [3])
    assert fingerprint(resumed) == fingerprint(policy)


def test_a_checkpoint_before_the_first_pass_has_no_scales(build: Callable[[], Policy], tmp_path: Path) -> None:
    policy = build()
    checkpoint.save(policy, tmp_path, 0, {}, keep=1)
    resumed = build()
    checkpoint.load_latest(resumed, tmp_path)
    for each in (policy, resumed):
        train(each, [1])
    assert fingerprint(resumed) == fingerprint(policy)


@pytest.mark.parametrize("prepared", [True, False])
def test_the_first_pass_is_as_precise_as_the_second(build: Callable[[], Policy], prepared: bool) -> None:
    """With delayed scaling's initial scale, gradients as small as these would all be 0. prepared: as in a run, the
    scales are set by a pass before the first one."""
    policy, rollouts = build(), random_rollouts()
    assert policy.unscaled
    if not prepared:
        policy.unscaled.clear()
    first, again = (policy.log_probs(rollouts)[0] for _ in "ab")
    assert torch.equal(first, again) or not prepared
    gradients = []
    for _ in "ab":
        policy.accumulate(rollouts, lambda _, values: 1e-9 * values.log_probs)
        gradients.append(torch.cat([g.flatten().clone() for _, g in policy.named_gradients()]))
    error = float((gradients[0] - gradients[1]).norm() / gradients[1].norm())
    assert error < 0.05 if prepared else error > 0.1, error
