"""One finished run as one JSON object: its curve, step by step, and what the held-out questions found.

Reads a run directory of the product; writes nothing.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from nemo_disco.evaluation.result import EvaluationResult, read_evaluations

CURVE = {
    "reward": "reward/mean",
    "objective": "objective/value",
    "kl": "policy/kl",
    "kl_stderr": "policy/kl_stderr",
    "entropy": "policy/entropy",
    "active": "constraint/active",
    "grad_norm": "grad_norm",
    "length": "response/length_mean",
    "mixed": "groups/mixed",
}
DIGITS = 5  # significant ones


def curve(run: Path) -> dict[str, list[float]]:
    """By name, a value a step; of the groups also the shares whose responses are all wrong and all right."""
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    columns = {name: [_rounded(step[metric]) for step in steps] for name, metric in CURVE.items()}
    shares = [_all_wrong_and_right(run / "rollouts" / f"step_{step['step']}.jsonl") for step in steps]
    return columns | {"all_wrong": [w for w, _ in shares], "all_right": [r for _, r in shares]}


def evaluation(directory: Path) -> dict[str, Any]:
    """The one evaluation in a directory: per question the number of right samples and the mean length."""
    [result] = read_evaluations(directory)
    return {
        "set": result.name,
        "samples": result.samples,
        "correct": result.correct.sum(1).tolist(),
        "length": [_rounded(float(x)) for x in result.lengths.mean(1)],
        "right_length": _rounded(_right_length(result)),
        "truncated": _rounded(float(result.truncated.mean())),
    }


def _right_length(result: EvaluationResult) -> float:
    right = result.lengths[result.correct]
    return float(right.mean()) if len(right) else 0.0


def _all_wrong_and_right(rollouts: Path) -> tuple[float, float]:
    groups: dict[int, list[bool]] = defaultdict(list)
    for line in rollouts.read_text().splitlines():
        response = json.loads(line)
        groups[response["question_id"]].append(response["correct"])
    count = len(groups)
    return (
        _rounded(sum(not any(g) for g in groups.values()) / count),
        _rounded(sum(all(g) for g in groups.values()) / count),
    )


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
