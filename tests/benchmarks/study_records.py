"""Records of finished runs with made-up results, in which the methods have the accuracies that a test chooses."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from benchmarks.study import grid as grids
from benchmarks.study.record import CURVES

QUESTIONS, SAMPLES, STEPS = 24, 16, 6


def make_record(run: grids.PlannedRun, accuracy: float, length: float = 30.0) -> dict[str, Any]:
    """The record of a run whose held-out accuracy is about `accuracy`, with responses of `length` tokens."""
    rng = random.Random(run.name)
    correct = [sum(rng.random() < accuracy for _ in range(SAMPLES)) for _ in range(QUESTIONS)]
    record = {
        "part": run.part,
        "method": run.method,
        "of": run.tuned_method,
        "seed": run.seed,
        "learning_rate": run.candidate.learning_rate if run.candidate else 1e-3,
        "beta": run.candidate.beta if run.candidate else None,
        "start": f"start of seed {run.seed}",
        "evaluation": {"set": "test", "samples": SAMPLES, "correct": correct, "length": [length] * QUESTIONS},
        "processor_seconds": 20.0,
        "version": "0000000",
    }
    if run.part == grids.BASE:
        return record
    return record | {"curve": {name: [0.1 + 0.01 * step for step in range(STEPS)] for name in CURVES}}


def make_all_records(grid: Mapping[str, Any], accuracies: Mapping[str, float]) -> list[dict[str, Any]]:
    """The records of all runs of the grid. accuracies: method -> its accuracy, 0.5 if it is not there."""
    return [make_record(run, accuracies.get(run.method, 0.5)) for run in grids.list_runs(grid)]
