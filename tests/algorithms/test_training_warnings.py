"""Each fault of a run is warned of once, with a remedy, also over a resume; noise around healthy figures never is."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest

from nemo_disco.algorithms.objectives.constraint import UNCONSTRAINED, Constraint
from nemo_disco.algorithms.training_warnings import TrainingWarnings

DELTA = 1e-3
K3 = Constraint(kind="squared_hinge", delta=DELTA)
K1 = Constraint(kind="squared_hinge", delta=DELTA, estimator="k1")
DUAL = Constraint(kind="dual", delta=DELTA, beta_min=0.01, beta_max=100.0)

# A step from which nothing is to be warned of.
HEALTHY: Mapping[str, Any] = {
    "policy/noise_floor": 1e-8,
    "policy/kl": 8e-4,
    "policy/kl_stderr": 1e-4,
    "policy/kl_after": 9e-4,
    "constraint/kl_after_over_delta": 0.9,
    "constraint/active": 0.25,
    "constraint/by_mini_batch": [{"k1": 8e-4}],
    "policy/entropy": 0.6,
    "dro/effective_sample": 0.8,
    "groups/mixed": 0.6,
    "groups/all_wrong": 0.2,
}
ABOVE = {"constraint/kl_after_over_delta": 2.5}


def warnings_of(
    steps: Iterable[Mapping[str, Any]], constraint: Constraint = K3, warnings: TrainingWarnings | None = None
) -> dict[int, list[str]]:
    """The warnings of a run by step, counted from 1, without the steps that have none.

    steps: the metrics of each that differ from HEALTHY.
    """
    warnings = warnings or TrainingWarnings(require_think=True)
    lines = {
        number: warnings.new_warnings(["a</think>b"], {**HEALTHY, **metrics}, constraint)
        for number, metrics in enumerate(steps, start=1)
    }
    return {number: new for number, new in lines.items() if new}


def only_warning(lines_by_step: dict[int, list[str]]) -> tuple[int, str]:
    """Step and text of a run's one warning."""
    [(step, [line])] = lines_by_step.items()
    return step, line


def noisy_run(steps: int, seed: int = 0) -> Iterator[dict[str, float]]:
    """A run that learns, with noise in every figure: entropy falls to a third and the questions all wrong get fewer."""
    rng = np.random.default_rng(seed)
    for done in np.linspace(0, 1, steps):
        yield {
            "policy/kl": float(rng.normal(8e-4, 2e-4)),
            "policy/kl_stderr": float(rng.uniform(1e-4, 3e-4)),
            "constraint/kl_after_over_delta": float(rng.lognormal(-0.2, 0.4)),
            "constraint/active": float(rng.random() < 0.5),
            "policy/entropy": float(0.6 * (1 - 0.7 * done) * rng.lognormal(0, 0.1)),
            "groups/all_wrong": rng.binomial(64, 0.3 - 0.2 * done) / 64,
            "groups/mixed": rng.binomial(4, 0.5) / 4,
            "dro/effective_sample": float(rng.uniform(0.8, 0.99)),
        }


@pytest.mark.parametrize("constraint", [K1, K3, DUAL, UNCONSTRAINED], ids=["k1", "k3", "dual", "none"])
def test_a_healthy_run_is_not_warned(constraint: Constraint) -> None:
    assert warnings_of([{}] * 100, constraint) == {}
    assert warnings_of(noisy_run(300), constraint) == {}


@pytest.mark.parametrize("constraint", [K1, K3, UNCONSTRAINED], ids=["k1", "k3", "none"])
def test_absent_and_nonfinite_metrics_are_no_fault(constraint: Constraint) -> None:
    warnings = TrainingWarnings(require_think=False)
    skipped = dict.fromkeys(HEALTHY, math.nan) | {"groups/mixed": 0.5}
    assert not any(warnings.new_warnings([], metrics, constraint) for metrics in [{}, skipped] * 30)


def test_a_constraint_that_is_inactive_while_k1_is_noise() -> None:
    quiet = {"constraint/active": 0.0, "policy/kl": -1e-4, "policy/kl_stderr": 2e-4}
    clear = {"constraint/active": 0.0, "policy/kl": 6e-4, "policy/kl_stderr": 2e-4}
    step, line = only_warning(warnings_of([{}, *[quiet, quiet, clear] * 20], K1))
    assert step == 21 and "estimator=k3" in line and "inactive for 20 steps, in 14" in line
    assert warnings_of([clear, clear, quiet] * 20, K1) == {}  # KL is known, and below delta
    assert warnings_of([*[quiet] * 19, {}] * 3, K1) == {}
    assert warnings_of([quiet] * 60, K3) == {}
    # A step of one mini-batch has KL 0, exactly: that is not noise.
    assert warnings_of([{"constraint/active": 0.0, "policy/kl": 0.0, "policy/kl_stderr": 0.0}] * 60, K1) == {}


def test_k1_with_an_error_that_is_large_for_delta() -> None:
    noisy = {"policy/kl_stderr": 5e-4}
    step, line = only_warning(warnings_of([{}, *[noisy] * 30], K1))
    assert step == 4 and "estimator=k3" in line and "5.00e-04" in line and "3 times as many" in line
    assert warnings_of([noisy, noisy, {}] * 10, K1) == {}
    assert warnings_of([noisy] * 30, K3) == warnings_of([noisy] * 30, DUAL) == {}


@pytest.mark.parametrize(
    ("constraint", "active", "remedy"),
    [
        (K3, 0.5, "raise algorithm.constraint.beta, now 1000, to 10000"),
        (K3, 0.0, "the penalty never fired"),
        (K1, 0.5, "estimator=k3"),
        (DUAL.with_multiplier(100), 1.0, "raise that"),
    ],
    ids=["beta", "inactive", "k1", "dual"],
)
def test_a_kl_that_stays_above_two_delta(constraint: Constraint, active: float, remedy: str) -> None:
    above = ABOVE | {"constraint/active": active}
    step, line = only_warning(warnings_of([{}, *[above] * 9, {}, *[above] * 30], constraint))
    assert step == 21 and "2.5 delta (0.001)" in line and "model.optim.lr" in line and remedy in line
    assert warnings_of([{"constraint/kl_after_over_delta": 1.9}] * 50, constraint) == {}


def test_a_dual_constraint_has_time_to_find_its_beta() -> None:
    step, line = only_warning(warnings_of([ABOVE] * 40, DUAL))
    assert step == 20 and "algorithm.constraint.rate" in line


def test_a_tau_without_effect() -> None:
    sizes = [0.9999, 0.99, 0.97, 0.999, 0.995]  # one step below the limit does not matter
    step, line = only_warning(warnings_of({"dro/effective_sample": size} for size in sizes * 4))
    assert step == 5 and "lower algorithm.tau" in line and "disco_b" in line and "0.9908" in line
    few = [{"dro/effective_sample": 0.999}, {"dro/effective_sample": math.nan}] * 4
    assert warnings_of(few) == {}  # four values
    assert list(warnings_of([*few, few[0]])) == [9]


@pytest.mark.parametrize(
    ("constraint", "remedy"),
    [
        (K3, "lower algorithm.constraint.delta"),
        (UNCONSTRAINED, "algorithm.constraint.kind=squared_hinge"),
        (Constraint(kind="kl_regularization"), "raise algorithm.constraint.beta"),
    ],
    ids=["hinge", "none", "regularization"],
)
def test_a_policy_that_narrows(constraint: Constraint, remedy: str) -> None:
    start = [{"policy/entropy": 0.6, "groups/all_wrong": share} for share in (0.1, 0.2) * 10]
    narrow = [{"policy/entropy": 0.2, "groups/all_wrong": share} for share in (0.5, 0.6) * 20]
    step, line = only_warning(warnings_of([*start, *narrow], constraint))
    assert 20 < step <= 30 and "entropy fell from 0.600" in line and "from 0.15" in line and remedy in line
    only_entropy = [{"policy/entropy": 0.2, "groups/all_wrong": share} for share in (0.1, 0.2) * 20]
    only_wrong = [{"policy/entropy": 0.4, "groups/all_wrong": share} for share in (0.5, 0.6) * 20]
    assert warnings_of([*start, *only_entropy], constraint) == warnings_of([*start, *only_wrong], constraint) == {}


def test_groups_without_right_and_wrong_responses() -> None:
    unmixed = {"groups/mixed": 0.0, "groups/all_wrong": 1.0}
    step, line = only_warning(warnings_of([{}, *[unmixed] * 4, {}, *[unmixed] * 30]))
    assert step == 11 and "for 5 steps" in line and "too hard" in line
    step, line = only_warning(warnings_of([{}, *[unmixed | {"groups/all_wrong": 0.0}] * 30]))
    assert step == 6 and "too easy" in line
    # The first step says so at once, and the steps that continue it do not repeat it; a later loss of them does.
    step, line = only_warning(warnings_of([unmixed] * 60))
    assert step == 1 and "in this step" in line
    assert list(warnings_of([unmixed, unmixed, {}, *[unmixed] * 30])) == [1, 8]


def test_rounding_near_delta() -> None:
    floors = ({"policy/noise_floor": floor} for floor in (math.nan, 2.9e-4, 3.1e-4, 1.0))
    step, line = only_warning(warnings_of(floors))
    assert step == 3 and "the noise floor, 3.10e-04, is above 0.3 of delta (0.001)" in line
    assert warnings_of([{"policy/noise_floor": 1.0}] * 5, UNCONSTRAINED) == {}


def test_missing_thinking_is_warned_of_once_in_a_run_too() -> None:
    first, second = TrainingWarnings(require_think=True), TrainingWarnings(require_think=True)
    (line,) = first.new_warnings(["no thought"], HEALTHY, K3)
    assert "</think>" in line
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.new_warnings(["no thought"], HEALTHY, K3) == []


FAULTY = [
    *[{}] * 12,
    *[ABOVE] * 12,
    *[{"policy/entropy": 0.1, "groups/all_wrong": 0.9, "dro/effective_sample": 0.99}] * 15,
    *[{"groups/mixed": 0.0, "policy/kl_stderr": 4e-4, "policy/kl": 1e-4, "constraint/active": 0.0}] * 25,
]


@pytest.mark.parametrize("every", [1, 7, 20])
def test_a_run_that_is_resumed_gives_the_same_warnings(every: int) -> None:
    expected = warnings_of(FAULTY, K1)
    assert sum(map(len, expected.values())) == 6
    lines_by_step: dict[int, list[str]] = {}
    warnings = TrainingWarnings(require_think=True)
    for start in range(0, len(FAULTY), every):
        state = json.loads(json.dumps(warnings.state_dict(), allow_nan=False))
        warnings = TrainingWarnings(require_think=True)
        warnings.load_state_dict(state)
        life = warnings_of(FAULTY[start : start + every], K1, warnings)
        lines_by_step |= {start + step: lines for step, lines in life.items()}
    assert lines_by_step == expected


def test_a_checkpoint_without_a_state_begins_anew() -> None:
    warnings = TrainingWarnings(require_think=True)
    warnings.load_state_dict({})
    assert list(warnings_of([{}, *[ABOVE] * 12], K3, warnings)) == [11]
