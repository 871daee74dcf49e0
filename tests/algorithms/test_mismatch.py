"""Mismatch of engine and policy: figures equal numpy's; the worst tokens, likely cause and limits are reported."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from bare_trainer import build_bare_trainer
from tiny_models import random_rollouts

from nemo_disco.algorithms import build_objective
from nemo_disco.algorithms.agreement import Agreement
from nemo_disco.algorithms.mismatch import likely_cause, mismatch, noise_warning, worst_tokens
from nemo_disco.algorithms.training_warnings import TrainingWarnings
from nemo_disco.config.compose import compose
from nemo_disco.config.schema import RunConfig
from nemo_disco.data.rollouts import Rollouts
from nemo_disco.runtime.errors import UserError


def make_rollouts(generation: torch.Tensor | None = None) -> Rollouts:
    """Random rollouts, always the same; generation [T]: the engine's log-probs, 0 by default."""
    rollouts = random_rollouts(questions=8)
    return rollouts if generation is None else replace(rollouts, generation_log_probs=generation.float())


@pytest.fixture
def trainer() -> torch.Tensor:
    """The trainer's log-probs [T] of the rollouts."""
    total = int(make_rollouts().response_lengths.sum())
    return -torch.rand(total, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 3 - 0.1


def noise(like: torch.Tensor, scale: float) -> torch.Tensor:
    """Normal noise of that standard deviation, in the shape of `like`."""
    return scale * torch.randn(like.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def build_agreement(config: RunConfig, policy: Any) -> Agreement:
    return Agreement(config.verify, config.generation, policy, Mock(**{"decode.return_value": "x"}))


def test_the_figures_equal_numpys(trainer: torch.Tensor) -> None:
    engine = trainer + noise(trainer, 0.1)
    delta = (trainer - engine).numpy()
    figures = mismatch(trainer, engine)
    assert figures["mismatch/mean_abs"] == pytest.approx(np.abs(delta).mean())
    assert figures["mismatch/max_abs"] == pytest.approx(np.abs(delta).max())
    assert figures["mismatch/mean_exp_abs"] == pytest.approx(np.exp(np.abs(delta)).mean())
    assert figures["mismatch/kl_k1"] == pytest.approx(-delta.mean())
    assert figures["mismatch/kl_k3"] == pytest.approx((np.exp(delta) - 1 - delta).mean())


def test_the_worst_tokens_are_found_in_their_responses(trainer: torch.Tensor) -> None:
    engine, rollouts = trainer.clone(), make_rollouts()
    response = int(rollouts.response_lengths.argmax())
    t = int(rollouts.response_offsets[response]) + 4
    engine[t] -= 2.0
    engine[t - 1] += 1.0
    worst = worst_tokens(trainer, make_rollouts(engine), 2)
    assert [(w.response, w.place) for w in worst] == [(response, 4), (response, 3)]
    assert worst[0].token == int(rollouts.response(response)[4])
    assert worst[0].engine == pytest.approx(worst[0].trainer - 2.0)


def faulty_log_probs(trainer: torch.Tensor) -> dict[str, torch.Tensor]:
    """The log-probs [T] of an engine with a fault, by words of the cause that is reported."""
    rollouts = make_rollouts()
    position = torch.cat([torch.arange(int(n)) for n in rollouts.response_lengths])
    tokens = torch.cat([rollouts.response(i) for i in range(len(rollouts))])
    return {
        "ignore the temperature": at_temperature_1(trainer),
        "rope": trainer + noise(trainer, 0.02) * position,
        "the output layer": trainer + 3.0 * (tokens == tokens.mode().values),
        "precision": trainer + noise(trainer, 0.02),
        "other weights": trainer + noise(trainer, 1.0),
    }


def at_temperature_1(trainer: torch.Tensor) -> torch.Tensor:
    """Log-probs [T] that stand for the trainer's on logits which are not divided by the temperature."""
    return trainer * 0.6 - 0.3


@pytest.mark.parametrize("cause", ["ignore the temperature", "rope", "the output layer", "precision", "other weights"])
def test_the_cause_is_recognized_by_the_pattern_of_the_difference(cause: str, trainer: torch.Tensor) -> None:
    rollouts = make_rollouts(faulty_log_probs(trainer)[cause])
    assert cause in likely_cause(trainer, rollouts, plain_log_probs=at_temperature_1(trainer), dtype=torch.bfloat16)


@pytest.mark.parametrize("cause", ["ignore the temperature", "rope", "generation.quantization=fp8", "other weights"])
def test_a_quantised_engine_is_named_where_the_difference_is_small(cause: str, trainer: torch.Tensor) -> None:
    engine = faulty_log_probs(trainer)["precision" if cause == "generation.quantization=fp8" else cause]
    assert cause in likely_cause(
        trainer,
        make_rollouts(engine),
        plain_log_probs=at_temperature_1(trainer),
        dtype=torch.bfloat16,
        quantization="fp8",
    )


def test_the_first_step_refuses_and_each_later_one_warns_in_one_line(trainer: torch.Tensor) -> None:
    warnings: list[str] = []
    policy = Mock(
        temperature=0.6, dtype=torch.float32, **{"target_values.return_value.log_probs": at_temperature_1(trainer)}
    )
    agreement = build_agreement(compose("quickstart"), policy)

    def check(step: int, scale: float, version: int | None = None, policy_log_probs: torch.Tensor = trainer) -> None:
        """Check a step whose engine differs by noise of that scale, and keep the warning."""
        rollouts = make_rollouts(trainer + noise(trainer, scale))
        versions = torch.full_like(rollouts.weight_versions, step if version is None else version)
        if warning := agreement.check_step(step, replace(rollouts, weight_versions=versions), policy_log_probs):
            warnings.append(warning)

    with pytest.raises(UserError, match=r"engine megatron disagree: mean e\^\|d\| 1\.\d+ \(verify.max_mismatch=1.05\)"):
        check(0, 0.2)
    assert policy.temperature == 0.6
    check(0, 0.001)
    check(1, 0.2, policy_log_probs=trainer * torch.nan)  # the policy's fault: its mini-batches are skipped
    check(1, 0.2, version=0)  # sampled from older weights
    assert warnings == []
    for step, scale in ((2, 0.2), (3, 0.2), (4, 0.001), (5, 0.2)):
        check(step, scale)
    assert [line.split(": trainer")[0] for line in warnings] == [f"step {n}: warning" for n in (3, 4, 6)]
    assert not any("\n" in line for line in warnings)


@pytest.mark.parametrize(
    ("dtype", "overrides", "limit"),
    [
        (torch.float32, [], "0.001 in float32"),
        (torch.float64, [], "0.001 in float64"),
        (torch.bfloat16, [], None),
        (torch.bfloat16, ["verify.max_kl=1e-3"], "verify.max_kl=0.001"),
        (torch.float32, ["verify.max_kl=1e-2"], None),
        (torch.bfloat16, ["generation=vllm", "generation.quantization=fp8"], "0.001 with generation.quantization=fp8"),
        (torch.bfloat16, ["verify.max_mismatch=1.04"], "0.01 in bfloat16"),
    ],
)
def test_the_limits_follow_the_settings_and_the_precision_and_are_explained(
    dtype: torch.dtype, overrides: list[str], limit: str | None, trainer: torch.Tensor
) -> None:
    """The engine differs as much as a real model in bfloat16 does by rounding: KL 0.0015, mean e^|d| 1.045.

    limit: part of the message about the limit that is exceeded; None if none is.
    """
    config = compose("quickstart", [*overrides, *["generation.python=python"] * bool(overrides[1:])])
    policy = Mock(temperature=0.6, dtype=dtype, **{"target_values.return_value.log_probs": at_temperature_1(trainer)})
    agreement = build_agreement(config, policy)
    rollouts = make_rollouts(trainer + noise(trainer, 0.055))
    rollouts = replace(rollouts, weight_versions=torch.zeros_like(rollouts.weight_versions))
    figures = r"e\^\|d\| 1\.04\d+ \(verify.max_mismatch=1\.0\d\), KL 0\.001\d+ \("
    with nullcontext() if limit is None else pytest.raises(UserError, match=rf"{figures}.*{limit}"):
        agreement.check_step(0, rollouts, trainer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kl_like_that_of_a_missing_norm_is_refused_in_every_precision(
    dtype: torch.dtype, trainer: torch.Tensor
) -> None:
    policy = Mock(temperature=0.6, dtype=dtype, **{"target_values.return_value.log_probs": at_temperature_1(trainer)})
    config = compose("quickstart", ["verify.max_mismatch=1e9"])
    agreement = build_agreement(config, policy)
    rollouts = make_rollouts(trainer + noise(trainer, 0.4))
    rollouts = replace(rollouts, weight_versions=torch.zeros_like(rollouts.weight_versions))
    with pytest.raises(UserError, match="disagree"):
        agreement.check_step(0, rollouts, trainer)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("policy", "the policy gives 1 of .* overflow in bfloat16: try trainer.precision=32"),
        ("engine", "the engine meg"),
    ],
)
def test_a_first_step_with_a_log_prob_that_is_not_finite_is_refused_whatever_the_limits(
    source: str, message: str, bad: float, trainer: torch.Tensor
) -> None:
    config = compose("quickstart", ["verify.max_mismatch=1e9", "verify.max_kl=1e9"])
    agreement = build_agreement(config, Mock(dtype=torch.bfloat16))
    log_probs = {"policy": trainer.clone(), "engine": trainer.clone()}
    log_probs[source][5] = bad
    rollouts = make_rollouts(log_probs["engine"])
    rollouts = replace(rollouts, weight_versions=torch.zeros_like(rollouts.weight_versions))
    with pytest.raises(UserError, match=message) as raised:
        agreement.check_step(0, rollouts, log_probs["policy"])
    assert "number 5 of response 0" in str(raised.value)


def test_the_trainer_logs_a_noise_floor_near_delta_once() -> None:
    hinge = build_objective({"name": "disco", "constraint": {"kind": "squared_hinge", "delta": 1e-4}})
    journal = Mock()
    warnings = TrainingWarnings(require_think=False)
    trainer = build_bare_trainer(compose("quickstart"), objective=hinge, warnings=warnings, journal=journal)
    for trainer.step, noise in enumerate((math.nan, 2.9e-5, 3.1e-5, 1.0), start=1):
        trainer._warn(Mock(texts=[]), {"policy/noise_floor": noise, "groups/mixed": 1.0})
    (line,) = [call.args[0] for call in journal.log.call_args_list]
    assert line.startswith("step 3: warning: the noise floor, 3.10e-05, is above 0.3 of delta (0.0001)")


def test_a_signal_that_only_another_rank_received_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = build_bare_trainer(compose("quickstart"), policy=Mock(device="cpu"))
    monkeypatch.setattr("torch.distributed.all_reduce", lambda votes, **_: votes.fill_(0))
    assert not trainer._must_stop() and not trainer.stop.number
    monkeypatch.setattr("torch.distributed.all_reduce", lambda votes, **_: votes.copy_(torch.tensor([15, 0])))
    assert trainer._must_stop() and trainer.stop.signal_name == "SIGTERM"


def test_without_a_hinge_there_is_no_warning_about_noise() -> None:
    assert noise_warning(1.0, build_objective({"name": "grpo"}).constraint) == ""
