"""The before/after table: statistics before and after training and their change, with 95% intervals.

Rows are data; only rich_table imports Rich.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nemo_disco.evaluation.result import EvaluationResult
from nemo_disco.evaluation.statistics import Estimate, bootstrap

if TYPE_CHECKING:
    from rich.table import Table

HEADER = ("metric", "before [95% CI]", "after [95% CI]", "change [95% CI]")
NOT_MEASURED = "-"
_TITLES = {"greedy": "greedy accuracy", "length": "response length (tokens)", "truncated": "truncated share"}


@dataclass(frozen=True)
class Row:
    """One statistic before and after. `change` is paired by question, so its interval is narrower than the two others
    suggest; None if the evaluations are not known to be of the same questions."""

    metric: str
    before: Estimate | None
    after: Estimate | None
    change: Estimate | None

    def cells(self) -> tuple[str, str, str, str]:
        tokens = self.metric.startswith("response length")
        return (
            self.metric,
            _format(self.before, tokens),
            _format(self.after, tokens),
            _format(self.change, tokens, sign="+"),
        )


def compare(before: EvaluationResult, after: EvaluationResult) -> list[Row]:
    """A row for each statistic of two evaluations of one set. Raises ValueError if they are of different sets."""
    if before.name != after.name:
        raise ValueError(f"cannot compare an evaluation of {before.name} with one of {after.name}")
    old_statistics, new_statistics = before.per_question(), after.per_question()
    titles = {"pass@1": f"Pass@1 (avg@{after.samples})", **_TITLES}
    hashes = [(result.identity or {}).get("questions") for result in (before, after)]
    same_questions = before.questions == after.questions and hashes[0] == hashes[1]
    rows = []
    for name in dict.fromkeys((*old_statistics, *new_statistics)):
        old, new = old_statistics.get(name), new_statistics.get(name)
        paired = old is not None and new is not None and same_questions
        rows.append(
            Row(
                metric=titles.get(name, name),
                before=None if old is None else bootstrap(old),
                after=None if new is None else bootstrap(new),
                change=bootstrap(np.subtract(new, old)) if paired else None,  # type: ignore[arg-type]
            )
        )
    return rows


def setup_differences(before: EvaluationResult, after: EvaluationResult) -> str:
    """A sentence on the differences between two evaluations apart from the weights: precision, engine, verifier, ...

    Empty if there is none, or if a result has no identity.
    """
    if before.identity is None or after.identity is None:
        return ""
    old, new = _flat(before.identity), _flat(after.identity)
    differing = [key for key in dict.fromkeys((*old, *new)) if old.get(key) != new.get(key)]
    if not differing:
        return ""
    changes = [
        f"{key} ({old.get(key)}, then {new.get(key)})"
        if len(old.get(key, "")) <= 40 and len(new.get(key, "")) <= 40  # a hash is too long to show
        else key
        for key in differing
    ]
    return f"The two evaluations were made differently, so the change is not training's alone: {'; '.join(changes)}."


def rich_table(rows: list[Row], title: str) -> Table:
    """The rows as a table for a terminal."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for i, name in enumerate(HEADER):
        table.add_column(name.replace("[", r"\["), justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(cell.replace("[", r"\[") for cell in row.cells()))
    return table


def _flat(identity: dict[str, Any]) -> dict[str, str]:
    """The identity without its weights and step, as a flat mapping of key or group.key to JSON text."""
    values: dict[str, Any] = {}
    for key, value in identity.items():
        if key not in ("step", "weights", "training_step"):
            values |= {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
    return {key: json.dumps(value, sort_keys=True) for key, value in values.items()}


def _format(estimate: Estimate | None, tokens: bool, sign: str = "") -> str:
    if estimate is None:
        return NOT_MEASURED
    form = f"{sign},.1f" if tokens else f"{sign}.3f"
    value, low, high = (format(x, form) for x in (estimate.value, estimate.low, estimate.high))
    return f"{value} [{low}, {high}]"
