"""The mismatch of two engines against numpy, the tokens it names and the causes it guesses."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from bare_trainer import bare_trainer
from tiny_models import random_rollouts

from nemo_disco.algorithms import build_objective
from nemo_disco.algorithms.agreement import Agreement
from nemo_disco.algorithms.mismatch import likely_cause, mismatch, noise_warning, worst_tokens
from nemo_disco.config.compose import compose
from nemo_disco.config.schema import RunConfig
from nemo_disco.data.rollouts import Rollouts
from nemo_disco.runtime.errors import UserError


def rollouts(generation: torch.Tensor | None = None) -> Rollouts:
    drawn = random_rollouts(questions=8)
    return drawn if generation is None else replace(drawn, generation_log_probs=generation.float())


@pytest.fixture
def trainer() -> torch.Tensor:
    total = int(rollouts().response_lengths.sum())
    return -torch.rand(total, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 3 - 0.1


def noise(like: torch.Tensor, scale: float) -> torch.Tensor:
    return scale * torch.randn(like.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def gate(config: RunConfig, policy: Any) -> Agreement:
    return Agreement(config.verify, config.generation, policy, Mock(**{"decode.return_value": "x"}))


def test_the_figures_are_numpys(trainer: torch.Tensor) -> None:
    engine = trainer + noise(trainer, 0.1)
    delta = (trainer - engine).numpy()
    found = mismatch(trainer, engine)
    assert found["mismatch/mean_abs"] == pytest.approx(np.abs(delta).mean())
    assert found["mismatch/max_abs"] == pytest.approx(np.abs(delta).max())
    assert found["mismatch/mean_exp_abs"] == pytest.approx(np.exp(np.abs(delta)).mean())
    assert found["mismatch/kl_k1"] == pytest.approx(-delta.mean())
    assert found["mismatch/kl_k3"] == pytest.approx((np.exp(delta) - 1 - delta).mean())


def test_the_worst_tokens_are_found_in_their_responses(trainer: torch.Tensor) -> None:
    engine, drawn = trainer.clone(), rollouts()
    response = int(drawn.response_lengths.argmax())
    at = int(drawn.response_offsets[response]) + 4
    engine[at] -= 2.0
    engine[at - 1] += 1.0
    worst = worst_tokens(trainer, rollouts(engine), 2)
    assert [(w.response, w.place) for w in worst] == [(response, 4), (response, 3)]
    assert worst[0].token == int(drawn.response(response)[4])
    assert worst[0].engine == pytest.approx(worst[0].trainer - 2.0)


def causes(trainer: torch.Tensor) -> dict[str, torch.Tensor]:
    drawn = rollouts()
    place = torch.cat([torch.arange(int(n)) for n in drawn.response_lengths])
    tokens = torch.cat([drawn.response(i) for i in range(len(drawn))])
    return {
        "ignore the temperature": plain(trainer),
        "rope": trainer + noise(trainer, 0.02) * place,
        "the output layer": trainer + 3.0 * (tokens == tokens.mode().values),
        "precision": trainer + noise(trainer, 0.02),
        "other weights": trainer + noise(trainer, 1.0),
    }


def plain(trainer: torch.Tensor) -> torch.Tensor:
    return trainer * 0.6 - 0.3


@pytest.mark.parametrize("cause", ["ignore the temperature", "rope", "the output layer", "precision", "other weights"])
def test_the_cause_is_told_by_the_shape_of_the_difference(cause: str, trainer: torch.Tensor) -> None:
    drawn = rollouts(causes(trainer)[cause])
    assert cause in likely_cause(trainer, drawn, plain_log_probs=plain(trainer), dtype=torch.bfloat16)


@pytest.mark.parametrize("cause", ["ignore the temperature", "rope", "generation.quantization=fp8", "other weights"])
def test_a_quantised_engine_is_named_where_the_difference_is_small(cause: str, trainer: torch.Tensor) -> None:
    drawn = rollouts({**causes(trainer), "generation.quantization=fp8": causes(trainer)["precision"]}[cause])
    assert cause in likely_cause(
        trainer, drawn, plain_log_probs=plain(trainer), dtype=torch.bfloat16, quantization="fp8"
    )


def test_the_first_step_refuses_and_each_later_one_warns_in_one_line(trainer: torch.Tensor) -> None:
    said: list[str] = []
    policy = Mock(temperature=0.6, dtype=torch.float32, **{"log_probs.return_value": (plain(trainer), None)})
    agreement = gate(compose("quickstart"), policy)

    def check(step: int, apart: float, version: int | None = None, policy_log_probs: torch.Tensor = trainer) -> None:
        drawn = rollouts(trainer + noise(trainer, apart))
        versions = torch.full_like(drawn.weight_versions, step if version is None else version)
        if warning := agreement.check_step(step, replace(drawn, weight_versions=versions), policy_log_probs):
            said.append(warning)

    with pytest.raises(UserError, match=r"engine megatron disagree: mean e\^\|d\| 1\.\d+ \(verify.max_mismatch=1.05\)"):
        check(0, 0.2)
    assert policy.temperature == 0.6
    check(0, 0.001)
    check(1, 0.2, policy_log_probs=trainer * torch.nan)  # the policy's own fault, whose mini-batches are skipped
    check(1, 0.2, version=0)  # sampled by the weights before
    assert said == []
    for step, apart in ((2, 0.2), (3, 0.2), (4, 0.001), (5, 0.2)):
        check(step, apart)
    assert [line.split(": trainer")[0] for line in said] == [f"step {n}: warning" for n in (3, 4, 6)]
    assert not any("\n" in line for line in said)


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
def test_the_limits_follow_the_settings_and_the_precision_and_say_so(
    dtype: torch.dtype, overrides: list[str], limit: str | None, trainer: torch.Tensor
) -> None:
    """The engine is as far away as bfloat16's rounding of a real model: KL 0.0015, mean e^|d| 1.045."""
    config = compose("quickstart", [*overrides, *["generation.python=python"] * bool(overrides[1:])])
    policy = Mock(temperature=0.6, dtype=dtype, **{"log_probs.return_value": (plain(trainer), None)})
    agreement = gate(config, policy)
    drawn = rollouts(trainer + noise(trainer, 0.055))
    drawn = replace(drawn, weight_versions=torch.zeros_like(drawn.weight_versions))
    figures = r"e\^\|d\| 1\.04\d+ \(verify.max_mismatch=1\.0\d\), KL 0\.001\d+ \("
    with nullcontext() if limit is None else pytest.raises(UserError, match=rf"{figures}.*{limit}"):
        agreement.check_step(0, drawn, trainer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kl_like_that_of_a_missing_norm_is_refused_in_every_precision(
    dtype: torch.dtype, trainer: torch.Tensor
) -> None:
    policy = Mock(temperature=0.6, dtype=dtype, **{"log_probs.return_value": (plain(trainer), None)})
    config = compose("quickstart", ["verify.max_mismatch=1e9"])
    agreement = gate(config, policy)
    drawn = rollouts(trainer + noise(trainer, 0.4))
    drawn = replace(drawn, weight_versions=torch.zeros_like(drawn.weight_versions))
    with pytest.raises(UserError, match="disagree"):
        agreement.check_step(0, drawn, trainer)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("whose", "message"),
    [
        ("policy", "the policy gives 1 of .* overflow in bfloat16: try trainer.precision=32"),
        ("engine", "the engine meg"),
    ],
)
def test_a_first_step_with_a_log_prob_that_is_not_finite_is_refused_whatever_the_limits(
    whose: str, message: str, bad: float, trainer: torch.Tensor
) -> None:
    config = compose("quickstart", ["verify.max_mismatch=1e9", "verify.max_kl=1e9"])
    agreement = gate(config, Mock(dtype=torch.bfloat16))
    sides = {"policy": trainer.clone(), "engine": trainer.clone()}
    sides[whose][5] = bad
    drawn = rollouts(sides["engine"])
    drawn = replace(drawn, weight_versions=torch.zeros_like(drawn.weight_versions))
    with pytest.raises(UserError, match=message) as raised:
        agreement.check_step(0, drawn, sides["policy"])
    assert "number 5 of response 0" in str(raised.value)


def test_a_noise_floor_near_delta_is_warned_of_once_a_life() -> None:
    hinge = build_objective({"name": "disco", "constraint": {"kind": "squared_hinge", "delta": 1e-4}})
    trainer = bare_trainer(compose("quickstart"), objective=hinge)
    trainer.warnings.new_warnings.return_value = []
    for noise in (math.nan, 2.9e-5, 3.1e-5, 1.0):
        trainer._warn(Mock(), {"policy/noise_floor": noise, "groups/mixed": 1.0})
    (line,) = [call.args[0] for call in trainer.journal.log.call_args_list]
    assert "warning: the noise floor, 3.10e-05, is above 0.3 of delta (0.0001)" in line


def test_a_signal_that_came_to_another_rank_alone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    algorithm = bare_trainer(compose("quickstart"), policy=Mock(device="cpu"))
    monkeypatch.setattr("torch.distributed.all_reduce", lambda votes, **_: votes.fill_(0))
    assert not algorithm._must_stop() and not algorithm.stop.number
    monkeypatch.setattr("torch.distributed.all_reduce", lambda votes, **_: votes.copy_(torch.tensor([15, 0])))
    assert algorithm._must_stop() and algorithm.stop.signal_name == "SIGTERM"


def test_without_a_hinge_no_noise_is_too_much() -> None:
    assert noise_warning(1.0, build_objective({"name": "grpo"}).constraint) == ""
