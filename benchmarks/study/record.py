"""The JSON record of one finished run: its training curves and the results of its evaluation.

Reads a directory that `nemo-disco train` or `nemo-disco evaluate` wrote; writes nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nemo_disco.evaluation.result import EvaluationResult, read_evaluations

# Name of a curve in the record -> metric in metrics.jsonl.
CURVES = {
    "reward": "reward/mean",
    "objective": "objective/value",
    "kl": "policy/kl",
    "kl_stderr": "policy/kl_stderr",
    "kl_after": "policy/kl_after",
    "constraint_kl": "constraint/kl",
    "entropy": "policy/entropy",
    "active": "constraint/active",
    "grad_norm": "grad_norm",
    "length": "response/length_mean",
    "mixed": "groups/mixed",
    "all_wrong": "groups/all_wrong",
    "all_right": "groups/all_right",
    "never_solved": "groups/never_solved",
}
DIGITS = 5  # significant digits of the record's figures


def read_curves(run: Path) -> dict[str, list[float]]:
    """The training curves of a run directory by name, each with one value for a step, NaN where it has none."""
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {name: [_round(step.get(metric)) for step in steps] for name, metric in CURVES.items()}


def read_evaluation(directory: Path) -> dict[str, Any]:
    """The results of the only evaluation in a directory.

    For each question: `correct`, the number of right samples, and `length`, their mean length in tokens. Over all
    samples: `right_length`, the mean length of the right ones, and `truncated`, the share of truncated ones.
    """
    [result] = read_evaluations(directory)
    return {
        "set": result.name,
        "samples": result.samples,
        "correct": result.correct.sum(1).tolist(),
        "length": [_round(float(x)) for x in result.lengths.mean(1)],
        "right_length": _round(_mean_right_length(result)),
        "truncated": _round(float(result.truncated.mean())),
    }


def _mean_right_length(result: EvaluationResult) -> float:
    """Mean length in tokens of the right samples; 0 if there are none."""
    right = result.lengths[result.correct]
    return float(right.mean()) if len(right) else 0.0


def _round(value: float | None) -> float:
    return float("nan") if value is None else float(f"{value:.{DIGITS}g}")
