"""Comparisons of two methods on the same starts and questions, and what they say about a hypothesis.

A difference is a mean over starts and questions with a bootstrap interval over both, which decides (hypotheses.md).
Beside it stands the p-value of an exact test over starts. Touches no files.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Generic, TypeVar

import numpy as np

from nemo_disco.evaluation.statistics import Estimate

from .statistics import Shares, estimate_difference
from .tables import format_difference, format_table

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Family(Generic[Key]):
    """A hypothesis and its comparisons (label, first method, second method); without a hypothesis: only described."""

    hypothesis: str
    pairs: Sequence[tuple[str, Key, Key]]


@dataclass(frozen=True)
class Comparison:
    """The first method's accuracy minus the second's, over the starts that both have; None and () if there are none.

    p: two-sided, of the sign-flip test over starts.
    """

    label: str
    difference: Estimate | None
    per_start: tuple[float, ...]
    p: float | None

    @property
    def decision(self) -> str:
        """Verdict of the interval on the hypothesis that the difference is above 0."""
        if self.difference is None:
            return "not run"
        if len(self.per_start) < 2:
            return "one start: not decided"
        if self.difference.low > 0:
            return "holds"
        return "the opposite" if self.difference.high < 0 else "not decided"


def compare(label: str, first: Shares, second: Shares) -> Comparison:
    """The comparison of two methods, paired by start and question."""
    common = sorted(set(first) & set(second))
    per_start = tuple(float(first[s].mean() - second[s].mean()) for s in common)
    return Comparison(label, estimate_difference(first, second), per_start, sign_flip_test(per_start))


def sign_flip_test(differences: Sequence[float]) -> float | None:
    """The two-sided p-value of paired differences: the share of their sign patterns with a mean as far from 0.

    Exact; its smallest value is 2 / 2^n. None for no differences.
    """
    if not differences:
        return None
    values = np.asarray(differences)
    signs = np.array(list(product((1, -1), repeat=len(values))))
    return float((np.abs(signs @ values) >= abs(values.sum()) - 1e-12).mean())


def report_families(values: Mapping[Key, Shares], families: Sequence[Family[Key]]) -> str:
    """The section of the hypotheses, as Markdown, with a table for each family; then the one that is only described."""
    tables = [[compare(label, values.get(a, {}), values.get(b, {})) for label, a, b in f.pairs] for f in families]
    decided = [c.decision for f, table in zip(families, tables, strict=True) for c in table if f.hypothesis]
    parts = [
        f"""## The hypotheses

Differences of avg@16 on the test questions, paired by start and question, with 95% bootstrap intervals over both. A
hypothesis says that the difference is above 0: it holds if the whole interval is, "the opposite" if it is below 0.
{_count(decided)}
The intervals are not corrected for their number. p, which decides nothing, is of the exact sign-flip test over starts.
"""
    ]
    for family, table in zip(families, tables, strict=True):
        title = f"### {family.hypothesis}" if family.hypothesis else "## Other comparisons\n\nDescribed, not decided."
        parts.append(f"{title}\n\n{_tabulate(table, decisions=bool(family.hypothesis))}")
    return "\n".join(parts)


def _count(decisions: Sequence[str]) -> str:
    """A sentence with the number of comparisons of each verdict."""
    counts = [f'{decisions.count(verdict)} say "{verdict}"' for verdict in dict.fromkeys(decisions)]
    return f"Of {len(decisions)} comparisons {', '.join(counts)}."


def _tabulate(comparisons: Sequence[Comparison], *, decisions: bool) -> str:
    head = ("first minus second", "difference", "starts", "starts above 0", "p", "here")
    rows = [
        (
            *(c.label, format_difference(c.difference), str(len(c.per_start)), str(sum(d > 0 for d in c.per_start))),
            *("" if c.p is None else f"{c.p:.3f}", c.decision),
        )
        for c in comparisons
    ]
    width = len(head) if decisions else len(head) - 1
    return format_table(head[:width], [row[:width] for row in rows])
