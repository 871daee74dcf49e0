"""Recommends estimator and delta of the KL constraint for a mini-batch's number of tokens. Pure arithmetic.

Near the old policy, with d = lp - old: KL = mean(d^2) / 2, so that at KL = delta k1 = mean(-d) has a standard error of
sqrt(2 delta / T). That of k3 = mean(d^2) / 2 is delta sqrt(2 / T) for normal d. Heavy tails of d make it larger: 1.2
times in the fact chains of docs/constraint.md, four times in a character-level model, which is assumed here.
"""

from __future__ import annotations

from math import sqrt

from nemo_disco.runtime.errors import UserError

# k1 is of use where its standard error at KL = delta is below this share of delta.
_USEFUL = 1 / 3
_TAILS = 4
# The authors' delta, for their mini-batches of a million tokens; and that of our studies, at up to thousands of tokens.
_AUTHORS_DELTA, _SMALL_DELTA = 1e-4, 1e-3


def k1_error(delta: float, tokens: int) -> float:
    """Standard error of k1 at KL = delta, in nats a token."""
    return sqrt(2 * delta / tokens)


def k3_error(delta: float, tokens: int) -> float:
    """Standard error of k3 at KL = delta, in nats a token."""
    return _TAILS * delta * sqrt(2 / tokens)


def advise(estimator: str, delta: float, tokens: int) -> str:
    """A line for the plan. tokens: the most response tokens of a mini-batch."""
    line = f"Constraint: a mini-batch has at most {tokens:,} response tokens"
    if delta > 0:
        errors = {"k1": k1_error(delta, tokens), "k3": k3_error(delta, tokens)}
        line += f"; at KL = delta = {delta:g} the standard error is at least "
        line += " and ".join(f"{error:.1e} ({error / delta:.2g} delta) with {name}" for name, error in errors.items())
    best = _AUTHORS_DELTA if k1_error(_AUTHORS_DELTA, tokens) <= _USEFUL * _AUTHORS_DELTA else _SMALL_DELTA
    wanted = {}
    if estimator == "k1" and (delta == 0 or k1_error(delta, tokens) > _USEFUL * delta):
        wanted["estimator"] = "k3"
    if not best / 5 <= delta <= best * 5:
        wanted["delta"] = f"{best:g}"
    if not wanted:
        return f"{line}. Recommended: as configured."
    keys = " ".join(f"algorithm.constraint.{name}={value}" for name, value in wanted.items())
    return f"{line}. Recommended: {keys}."


def check_likely_tokens(count: int, vocabulary: int) -> None:
    """Raises UserError if the constraint compares more likely tokens than there are tokens."""
    if count > vocabulary:
        raise UserError(
            f"algorithm.constraint.top_k={count}: the model has {vocabulary} tokens; with that many the KL is exact, "
            "and a small number such as 16 comes close"
        )
