"""Candidates of a method's tuning: a learning rate and, for a constrained method, the constraint's beta."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any


@dataclass(frozen=True)
class Candidate:
    """A learning rate and the constraint's beta; None where the method's own value stays."""

    learning_rate: float
    beta: float | None = None

    def __str__(self) -> str:
        return f"lr_{self.learning_rate:g}" + ("" if self.beta is None else f".beta_{self.beta:g}")


def list_candidates(settings: Mapping[str, Any]) -> list[Candidate]:
    """All pairs of the `learning_rates` and `betas` in a section of a grid; `betas` may be missing."""
    betas: Sequence[float | None] = settings.get("betas", (None,))
    return [
        Candidate(float(rate), None if beta is None else float(beta))
        for rate, beta in product(settings["learning_rates"], betas)
    ]
