"""Warnings about a run whose metrics show a known fault, each given once in the run: a sentence with the figure, and
the settings that mend it.

Pure: texts, metrics and the constraint in, sentences out; the state is plain JSON. Measures nothing itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, sqrt
from statistics import fmean, variance
from typing import Any

from nemo_disco.algorithms.mismatch import noise_warning
from nemo_disco.algorithms.objectives.constraint import DUAL, K1, NONE, SQUARED_HINGE, Constraint
from nemo_disco.rollout.response_warnings import ResponseWarnings

RECENT = 20  # values that are kept of each figure; also the steps after which an inactive constraint is suspicious
WINDOW = 10  # steps at the run's beginning, and up to now, whose means are compared
ABOVE_LIMIT = 10  # steps in a row that the KL must stay above its limit: at a run's first steps it often is
IN_A_ROW = 3  # steps in a row that k1's error must stay above its limit
UNMIXED = 5  # steps in a row without a mixed group
TAU_STEPS = 5  # steps over which the effective sample size is averaged

MAX_KL_OVER_DELTA = 2.0
MAX_ERROR_OVER_DELTA = 1 / 3
MAX_EFFECTIVE_SAMPLE = 0.98
AIM_EFFECTIVE_SAMPLE = 0.9  # that of the tau which the warning suggests
MIN_GROWTH = 0.1  # of the share of questions all wrong; it must also be MIN_ERRORS standard errors
MIN_ERRORS = 4

_METRICS = (
    *("policy/noise_floor", "policy/entropy", "constraint/active", "constraint/kl_after_over_delta"),
    *("dro/effective_sample", "groups/mixed", "groups/all_wrong"),
)
# Figures of a squared hinge on k1: 1 if |k1| is below its standard error, else 0; and that error over delta.
_K1_UNKNOWN, _K1_ERROR, _K1_ACTIVE = "k1/unknown", "k1/error_over_delta", "k1/active"


@dataclass
class History:
    """The values of each figure in a run so far, by its name: the first WINDOW and the last RECENT ones.

    A step in which a figure is absent or not finite adds nothing to it, so "in a row" is of steps that have the figure.
    """

    first: dict[str, list[float]] = field(default_factory=dict)
    recent: dict[str, list[float]] = field(default_factory=dict)

    def add(self, figures: Mapping[str, float]) -> None:
        """Add a step's figures."""
        for name, value in figures.items():
            if len(first := self.first.setdefault(name, [])) < WINDOW:
                first.append(value)
            self.recent[name] = [*self.recent.get(name, ()), value][-RECENT:]

    def last(self, name: str, steps: int) -> list[float]:
        """The last `steps` values of a figure, oldest first; [] if there are fewer."""
        values = self.recent.get(name, [])
        return values[-steps:] if len(values) >= steps else []


class TrainingWarnings:
    """The warnings about a run's steps that have not been given yet.

    require_think: True if a response without `</think>` gets reward 0.
    """

    def __init__(self, require_think: bool) -> None:
        self._responses = ResponseWarnings(require_think)
        self._given: set[str] = set()
        self._history = History()

    def new_warnings(self, texts: Sequence[str], metrics: Mapping[str, Any], constraint: Constraint) -> list[str]:
        """The warnings that this step is the first to justify. To be called once a step.

        texts: the step's responses; metrics: the step's, under their names in metrics.jsonl; an absent one warns of
        nothing. constraint: the objective's.
        """
        self._history.add(_figures(metrics, constraint))
        lines = self._responses.new_warnings(texts)
        for name, check in CHECKS.items():
            if name not in self._given and (line := check(self._history, constraint)):
                self._given.add(name)
                lines.append(line)
        return lines

    def state_dict(self) -> dict[str, Any]:
        """The warnings given so far and the history, as JSON."""
        given = self._given | ({"thinking"} if self._responses.given else set())
        return {"given": sorted(given), "first": self._history.first, "recent": self._history.recent}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a checkpoint's state; {}, of a checkpoint without one, begins anew."""
        given = set(state.get("given", ()))
        self._responses.given, self._given = "thinking" in given, given - {"thinking"}
        parts = ({name: list(values) for name, values in state.get(key, {}).items()} for key in ("first", "recent"))
        self._history = History(*parts)


def _figures(metrics: Mapping[str, Any], constraint: Constraint) -> dict[str, float]:
    """The finite figures of a step that the checks read, by name."""
    figures = {name: float(metrics.get(name, math.nan)) for name in _METRICS}
    if constraint.kind == SQUARED_HINGE and constraint.estimator == K1:
        kl, error = (float(metrics.get(name, math.nan)) for name in ("policy/kl", "policy/kl_stderr"))
        if math.isfinite(kl) and math.isfinite(error):
            figures |= {_K1_UNKNOWN: float(abs(kl) < error), _K1_ACTIVE: figures["constraint/active"]}
            figures |= {_K1_ERROR: error / constraint.delta} if constraint.delta else {}
    return {name: value for name, value in figures.items() if math.isfinite(value)}


def _noise_floor(history: History, constraint: Constraint) -> str:
    floor = history.last("policy/noise_floor", 1)
    return noise_warning(floor[0], constraint) if floor else ""


def _inactive(history: History, _: Constraint) -> str:
    """Inactive for RECENT steps, in more than half of which k1 is smaller than its own error."""
    active, unknown = history.last(_K1_ACTIVE, RECENT), history.last(_K1_UNKNOWN, RECENT)
    if not active or any(active) or not sum(unknown) > RECENT / 2:
        return ""
    return (
        f"the constraint was inactive for {RECENT} steps, in {sum(unknown):.0f} of which KL_hat was smaller than its "
        "standard error: k1 cannot tell how far the policy has moved; set algorithm.constraint.estimator=k3, or "
        "raise algorithm.mini_batch_questions"
    )


def _kl_above_delta(history: History, constraint: Constraint) -> str:
    """KL after the step above 2 delta, ABOVE_LIMIT steps; RECENT ones while a dual constraint's beta can still grow."""
    at_bound = constraint.beta_max is not None and constraint.strength >= constraint.beta_max
    steps = RECENT if constraint.kind == DUAL and not at_bound else ABOVE_LIMIT
    ratios = history.last("constraint/kl_after_over_delta", steps)
    if not ratios or not min(ratios) > MAX_KL_OVER_DELTA:
        return ""
    beta = f"{constraint.strength:g}"
    slower = "lower model.optim.lr"
    if constraint.kind == DUAL and at_bound:
        remedy = f"beta has reached algorithm.constraint.beta_max={beta}: raise that, or {slower}"
    elif constraint.kind == DUAL:
        remedy = f"beta, now {beta}, grows too slowly: raise algorithm.constraint.rate, or {slower}"
    elif not any(history.last("constraint/active", steps)):
        remedy = f"the penalty never fired, since it sees only the KL before a step's last update: {slower}"
    else:
        remedy = f"raise algorithm.constraint.beta, now {beta}, to {10 * constraint.strength:g}, or {slower}"
    estimator = ", and set algorithm.constraint.estimator=k3, whose gradient is less noisy than k1's"
    return (
        f"the KL after a step has been above {MAX_KL_OVER_DELTA:g} delta for {steps} steps, and is now "
        f"{ratios[-1]:.1f} delta ({constraint.delta:g}); {remedy}{estimator if constraint.estimator == K1 else ''}"
    )


def _k1_error(history: History, constraint: Constraint) -> str:
    """k1's standard error above delta / 3 in IN_A_ROW steps."""
    errors = history.last(_K1_ERROR, IN_A_ROW)
    if not errors or not min(errors) > MAX_ERROR_OVER_DELTA:
        return ""
    times = ceil((errors[-1] / MAX_ERROR_OVER_DELTA) ** 2)
    return (
        f"the standard error of k1 has been above a third of delta for {IN_A_ROW} steps, and is now "
        f"{errors[-1] * constraint.delta:.2e} for delta {constraint.delta:g}: the constraint fires on noise; set "
        f"algorithm.constraint.estimator=k3, or raise algorithm.mini_batch_questions ({times} times as many), or raise "
        "algorithm.constraint.delta"
    )


def _tau(history: History, _: Constraint) -> str:
    """Mean effective sample size of TAU_STEPS steps above MAX_EFFECTIVE_SAMPLE.

    1 - size is about var(s) / tau^2 for scores s, which gives the tau for another size.
    """
    sizes = history.last("dro/effective_sample", TAU_STEPS)
    if not sizes or not fmean(sizes) > MAX_EFFECTIVE_SAMPLE:
        return ""
    factor = sqrt(max(1 - fmean(sizes), 1e-6) / (1 - AIM_EFFECTIVE_SAMPLE))
    return (
        f"tau has no effect: the weights of the wrong responses are almost equal (their effective sample size is "
        f"{fmean(sizes):.4f} of their number, over {TAU_STEPS} steps); lower algorithm.tau ({factor:.1g} times its "
        f"value would give about {AIM_EFFECTIVE_SAMPLE:g}), or set algorithm=disco_b, which has no tau"
    )


def _narrowing(history: History, constraint: Constraint) -> str:
    """Entropy below half of the first WINDOW steps' mean in the last WINDOW, while questions all wrong have grown."""
    start, now = (_windows(history, name) for name in ("policy/entropy", "groups/all_wrong"))
    if start is None or now is None:
        return ""
    (entropy_then, entropy_now), (wrong_then, wrong_now) = start, now
    error = sqrt((variance(wrong_then) + variance(wrong_now)) / WINDOW)
    grown = fmean(wrong_now) - fmean(wrong_then) > max(MIN_GROWTH, MIN_ERRORS * error)
    if not grown or not fmean(entropy_now) < fmean(entropy_then) / 2:
        return ""
    if constraint.kind == NONE:
        tighter = "set algorithm.constraint.kind=squared_hinge"
    else:
        tighter = "lower algorithm.constraint.delta" if constraint.limit else "raise algorithm.constraint.beta"
    return (
        f"the policy narrows: its entropy fell from {fmean(entropy_then):.3f} to {fmean(entropy_now):.3f}, while the "
        f"share of questions without a right response grew from {fmean(wrong_then):.2f} to {fmean(wrong_now):.2f}; "
        f"resume from an earlier checkpoint with a lower model.optim.lr, or {tighter}"
    )


def _windows(history: History, name: str) -> tuple[list[float], list[float]] | None:
    """A figure's first and last WINDOW values; None as long as they overlap."""
    return (history.first[name], history.last(name, WINDOW)) if history.last(name, 2 * WINDOW) else None


def _unmixed_at_first(history: History, _: Constraint) -> str:
    """No group with right and wrong responses in the first step, which is more often a mistake than chance."""
    is_first = len(history.recent.get("groups/mixed", ())) == 1
    return "" if not is_first or history.first["groups/mixed"][0] else _nothing_learned(history, "in this step")


def _unmixed(history: History, _: Constraint) -> str:
    """The same in UNMIXED steps in a row; not the ones that go on from the first step, of which the run has warned."""
    mixed = history.last("groups/mixed", UNMIXED)
    if not mixed or any(mixed) or not (history.first["groups/mixed"][0] or any(history.recent["groups/mixed"])):
        return ""
    return _nothing_learned(history, f"for {UNMIXED} steps")


def _nothing_learned(history: History, when: str) -> str:
    wrong = history.last("groups/all_wrong", 1)
    if not wrong:
        others = "easier or harder questions"
    elif wrong[0] < 0.5:
        others = "they are too easy: take harder questions"
    else:
        others = "they are too hard, or graded wrong: try nemo-disco grade, or take easier questions"
    return (
        f"no question had both right and wrong responses {when}, so nothing was learned; look at rollouts/; {others}, "
        "or raise generation.responses_per_question"
    )


# Name of a warning in the state -> its check: a sentence, or "" while the history does not justify it.
CHECKS: Mapping[str, Callable[[History, Constraint], str]] = {
    "noise_floor": _noise_floor,
    "inactive": _inactive,
    "kl_above_delta": _kl_above_delta,
    "k1_error": _k1_error,
    "tau": _tau,
    "narrowing": _narrowing,
    "unmixed_at_first": _unmixed_at_first,
    "unmixed": _unmixed,
}
