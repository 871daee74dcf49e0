"""build_objective: its defaults, users' own objectives, and an error of one line for invalid settings."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from user_module import write_user_module

from nemo_disco.algorithms import MiniBatch, Objective, build_objective
from nemo_disco.algorithms.objectives import OBJECTIVES
from nemo_disco.commands.components import build_run_objective
from nemo_disco.config.compose import compose
from nemo_disco.data.rollouts import Rollouts
from nemo_disco.rollout.rewarding import compute_column
from nemo_disco.runtime.errors import UserError

from .cases import random_case, to_mini_batch

ALL = sorted(OBJECTIVES)


def test_every_objective_has_its_name() -> None:
    assert all(build_objective({"name": name}).name == name for name in ALL)


@pytest.mark.parametrize("name", ALL)
def test_the_constraint_by_default(name: str) -> None:
    hinged = name in ("disco", "disco_b", "drpo")
    constraint = build_objective({"name": name}).constraint
    assert constraint.kind == ("squared_hinge" if hinged else "none")
    assert (constraint.convention, constraint.estimator) == ("paper", "k3")
    explicit = build_objective({"name": name, "constraint": {"kind": "squared_hinge"}}).constraint
    assert (explicit.strength, explicit.delta) == (1e3, 1e-4)
    assert build_objective({"name": name, "constraint": {"kind": "kl_regularization"}}).constraint.strength == 1e-3


def test_a_parameter_that_is_none_has_its_default() -> None:
    unset = {"score": None, "tau": None, "lambda": None, "clip_low": None, "clip_high": None, "threshold": None}
    constraint = {"kind": None, "beta": None, "delta": None, "convention": None, "estimator": None, "top_k": None}
    for name in ALL:
        assert build_objective({"name": name, "constraint": constraint} | unset) == build_objective({"name": name})


def test_a_constraint_with_some_parameters_has_defaults_for_the_others() -> None:
    constraint = build_objective({"name": "disco", "constraint": {"delta": 3e-3}}).constraint
    assert (constraint.kind, constraint.strength, constraint.delta) == ("squared_hinge", 1e3, 3e-3)


@pytest.mark.parametrize(("score", "tau"), [("log_likelihood", 10.0), ("likelihood_ratio", 1.0)])
def test_tau_by_default(score: str, tau: float) -> None:
    batch = to_mini_batch(random_case(61))
    for name in ("disco", "drpo"):
        settings = {"name": name, "score": score}
        default, explicit = build_objective(settings)(batch), build_objective(settings | {"tau": tau})(batch)
        assert default.token_weights.equal(explicit.token_weights)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"algorithm.name is missing; known: .*disco"),
        ({"name": "disko"}, r"no objective 'disko'; known: disco, .*grpo.*module:Class"),
        ({"name": "GRPO-ER"}, r"no objective 'GRPO-ER'; known: grpo_er, "),
        (
            {"name": "disco", "score": "likelihood"},
            r"disco: score must be one of: .*log_likelihood.*; it is 'likelihood'",
        ),
        ({"name": "disco", "tau": 0}, r"disco: tau must be above 0; it is 0"),
        ({"name": "disco", "tau": -1.0}, r"tau must be above 0"),
        ({"name": "disco", "tau": math.inf}, r"tau must be finite"),
        ({"name": "disco", "tau": math.nan}, r"tau must be finite"),
        ({"name": "disco", "tau": "10"}, r"tau must be a number; it is '10'"),
        ({"name": "disco", "tau": True}, r"tau must be a number"),
        ({"name": "disco_b", "tau": 10.0}, r"disco_b does not take 'tau'; it takes: .*score"),
        ({"name": "grpo", "score": "log_likelihood"}, r"grpo does not take 'score'"),
        ({"name": "disco", "lambda": 0.1}, r"disco does not take 'lambda'"),
        ({"name": "disco", "tua": 1.0}, r"does not take 'tua'; it takes: tau, "),
        ({"name": "drpo", "lambda": 0}, r"drpo: lambda must be above 0"),
        ({"name": "drpo", "lambda": -math.inf}, r"lambda must be above 0"),
        ({"name": "drpo", "lambda": math.nan}, r"lambda must be finite"),
        ({"name": "drpo", "lambda_": 1.0}, r"does not take 'lambda_'; it takes: lambda"),
        ({"name": "grpo", "clip_low": -0.1}, r"grpo: clip_low must be at least 0; it is -0.1"),
        ({"name": "grpo", "clip_low": 1.0}, r"clip_low must be below 1"),
        ({"name": "dapo", "clip_high": -0.1}, r"dapo: clip_high must be at least 0"),
        ({"name": "dapo", "clip_high": math.inf}, r"clip_high must be finite"),
        (
            {"name": "disco_b", "clip_high": 0.2},
            r"clip_low and clip_high clip the score likelihood_ratio; score is log",
        ),
        ({"name": "grpo", "threshold": math.nan}, r"threshold must be finite"),
        ({"name": "disco_b", "question_weight": "yes"}, r"question_weight must be one of: "),
        ({"name": "disco", "constraint": "hinge"}, r"constraint must be a mapping; it is 'hinge'"),
        ({"name": "disco", "constraint": {"kind": "hinge"}}, r"constraint.kind must be one of: squared_hinge, "),
        ({"name": "disco", "constraint": {"beta": -1}}, r"constraint.beta must be at least 0"),
        ({"name": "disco", "constraint": {"delta": -1e-4}}, r"constraint.delta must be at least 0"),
        ({"name": "disco", "constraint": {"beta": math.inf}}, r"constraint.beta must be finite"),
        ({"name": "disco", "constraint": {"convention": "mine"}}, r"constraint.convention must be one of: .*paper"),
        (
            {"name": "disco", "constraint": {"estimator": "k2"}},
            r"constraint.estimator must be one of: .*k1.*; it is 'k2'",
        ),
        ({"name": "disco", "constraint": {"estimator": "top_4"}}, r"constraint.estimator must be one of: top_k, "),
        ({"name": "disco", "constraint": {"top_k": 0}}, r"constraint.top_k must be at least 1; it is 0"),
        ({"name": "disco", "constraint": {"top_k": 2.0}}, r"constraint.top_k must be an integer; it is 2.0"),
        ({"name": "disco", "constraint": {"kind": "dual"}}, r"constraint.beta_min is missing: .*beta_max=100"),
        ({"name": "grpo", "constraint": {"kind": "dual", "beta_min": 0.1}}, r"constraint.beta_max is missing: "),
        (
            {"name": "disco", "constraint": {"kind": "dual", "beta_min": 2, "beta_max": 9}},
            r"constraint.beta=1, with which dual starts, must be within \[beta_min, beta_max\], which is \[2, 9\]",
        ),
        (
            {"name": "disco", "constraint": {"kind": "dual", "beta_min": 0.1, "beta_max": 9, "delta": 0}},
            r"constraint.delta must be above 0 for constraint.kind=dual",
        ),
        ({"name": "disco", "constraint": {"gamma": 1}}, r"constraint does not take 'gamma'; it takes: "),
        ({"name": "grpo", "constraint": {"delta": 1e-3}}, r"constraint.delta: objective grpo has no constraint unless"),
        ({"name": "disco", "off_policy": {"kind": "tis"}}, r"off_policy.kind must be one of: .*truncated_imp"),
        ({"name": "disco", "off_policy": {"cap": 0}}, r"off_policy.cap must be above 0; it is 0"),
        ({"name": "disco", "off_policy": {"clip": 1}}, r"off_policy does not take 'clip'; it takes: "),
        ({"name": "drpo", "preference": 1}, r"drpo: preference must be the name of a reward term; it is 1"),
        ({"name": "rloo_lp", "alpha": -0.1}, r"rloo_lp: alpha must be at least 0"),
        ({"name": "alp", "alpha": 0.1}, r"alp does not take 'alpha'; it takes: "),
        ({"name": "hapo", "length_weight": math.nan}, r"hapo: length_weight must be finite"),
        ({"name": "nowhere_at_all:Mine"}, r"importing nowhere_at_all raised ModuleNotFoundError"),
        ({"name": "math:Mine"}, r"algorithm.name=math:Mine: .*math.* has no 'Mine'"),
        ({"name": "math:sqrt"}, r"algorithm.name=math:sqrt must be a subclass of nemo_disco.algorithms.Objective"),
    ],
)
def test_bad_input_is_one_clear_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        build_objective(settings)
    assert "\n" not in str(error.value)


USER_OBJECTIVES = """
from dataclasses import dataclass

import torch

from nemo_disco.algorithms import Objective
from nemo_disco.algorithms.objectives import Signal, parameter


@dataclass(frozen=True, kw_only=True)
class Reinforce(Objective):
    scale: float = parameter(1.0, above=0)

    def value(self, batch):
        return self.scale * (batch.token_mean(batch.log_probs) * batch.rewards).mean()


class Repeats(Signal):
    name = "repeats"

    def __init__(self):
        self.counts = {}

    def annotate(self, responses):
        ids = responses.question_ids.tolist()
        column = torch.tensor([self.counts.get(i, 0) for i in ids])
        self.counts |= {i: self.counts.get(i, 0) + 1 for i in ids}
        return column


class Fresh(Objective):
    needs = frozenset({"repeats"})

    def signals(self):
        return [Repeats()]

    def value(self, batch):
        return (batch.token_mean(batch.log_probs) / (1 + batch["repeats"])).sum()


class Unknown(Fresh):
    needs = frozenset({"repeats", "weather"})


class Raises(Objective):
    def value(self, batch):
        return batch.log_probs.reshape(-1, 10**9).sum()


class NotANumber(Objective):
    def value(self, batch):
        return (batch.log_probs * 0).sum() / 0


class NanGradient(Objective):
    def value(self, batch):
        return (batch.log_probs - batch.log_probs).abs().sqrt().sum()


class Vector(Objective):
    def value(self, batch):
        return batch.log_probs


class EndsWhenMade(Vector):
    def __post_init__(self):
        raise SystemExit(0)


class EndsWhenAsked(Vector):
    @property
    def needs(self):
        raise SystemExit(0)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a user's module with the objectives of USER_OBJECTIVES, ready to be imported."""
    return write_user_module(tmp_path / "my_objectives_of_this_test.py", USER_OBJECTIVES, monkeypatch)


def test_a_users_own_objective(module: Path) -> None:
    settings = {"name": f"{module.stem}:Reinforce", "scale": 2.0, "constraint": {"kind": "squared_hinge"}}
    objective = build_objective(settings)
    assert isinstance(objective, Objective)
    assert objective.name == "Reinforce"
    assert not objective.separable
    case = random_case(62, spread=0.0)
    output = objective(to_mini_batch(case))
    n = len(case.lengths)
    expected = [-2.0 * case.rewards[i] / n / case.lengths[i] for i in range(n) for _ in case.tokens(i)]
    torch.testing.assert_close(output.token_weights, torch.tensor(expected, dtype=torch.float64))
    with pytest.raises(UserError, match="Reinforce: scale must be above 0"):
        build_objective({"name": f"{module.stem}:Reinforce", "scale": 0})


@pytest.mark.parametrize("cls", ["EndsWhenMade", "EndsWhenAsked"])
def test_a_users_objective_that_exits_while_it_is_built_is_named_too(module: Path, cls: str) -> None:
    with pytest.raises(UserError, match=rf"objective {cls} raised SystemExit at {module}:\d+: 0"):
        build_objective({"name": f"{module.stem}:{cls}"})


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        ("Raises", r"objective Raises raised RuntimeError at {path}:47: "),
        ("NotANumber", r"objective NotANumber: {path}:51 must return a finite tensor; it returned nan"),
        ("NanGradient", r"objective NanGradient \({path}:56\): .*gradient is not finite"),
        ("Vector", r"objective Vector: value must return a 0-d tensor; its shape is \[\d+\]"),
    ],
)
def test_a_users_mistake_is_named_with_file_and_line(module: Path, cls: str, message: str) -> None:
    objective = build_objective({"name": f"{module.stem}:{cls}"})
    with pytest.raises(UserError, match=message.format(path=module)):
        objective(to_mini_batch(random_case(63)))


def test_a_users_objective_may_declare_a_signal_of_its_own(module: Path) -> None:
    """The signal's column is computed for each step's rollouts, and the objective reads it."""
    config = compose("quickstart", ["algorithm=base", f"algorithm.name={module.stem}:Fresh"])
    objective = build_run_objective(config)
    [signal] = objective.signals()
    rollouts = Rollouts.pack([[1]] * 3, [[2], [3, 4], [5]], [[0.0], [0.0] * 2, [0.0]], [7, 8, 7], [False] * 3)
    assert [compute_column(signal, rollouts).tolist() for _ in range(2)] == [[0, 0, 0], [1, 1, 1]]
    batch = MiniBatch(
        log_probs=torch.zeros(4),
        old_log_probs=torch.zeros(4),
        lengths=torch.tensor([1, 2, 1]),
        question_ids=torch.tensor([7, 8, 7]),
        rewards=torch.ones(3),
        max_response_length=2,
        columns={"repeats": torch.tensor([0, 1, 3])},
    )
    assert objective(batch).token_weights.tolist() == [-1.0, -0.25, -0.25, -0.25]
    with pytest.raises(UserError, match="objective Unknown needs weather, which nothing computes"):
        build_run_objective(compose("quickstart", ["algorithm=base", f"algorithm.name={module.stem}:Unknown"]))
