"""Made-up finished runs of a grid, with a known order of the methods."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from benchmarks.study import grid as grids
from benchmarks.study.record import CURVE

QUESTIONS, SAMPLES, STEPS = 24, 16, 6


def made_up(item: grids.Item, accuracy: float, length: float = 30.0) -> dict[str, Any]:
    """The record of a run whose held-out accuracy is about `accuracy`."""
    rng = random.Random(item.name)
    correct = [sum(rng.random() < accuracy for _ in range(SAMPLES)) for _ in range(QUESTIONS)]
    record = {
        "part": item.part,
        "method": item.method,
        "of": item.of,
        "seed": item.seed,
        "learning_rate": item.learning_rate or 1e-3,
        "evaluation": {"set": "test", "samples": SAMPLES, "correct": correct, "length": [length] * QUESTIONS},
        "processor_seconds": 20.0,
        "version": "0000000",
    }
    if item.part == grids.BASE:
        return record
    names = (*CURVE, "all_wrong", "all_right")
    return record | {"curve": {name: [0.1 + 0.01 * step for step in range(STEPS)] for name in names}}


def all_of(grid: Mapping[str, Any], accuracies: Mapping[str, float]) -> list[dict[str, Any]]:
    """Every run of the grid; a method that is not in `accuracies` has 0.5."""
    return [made_up(item, accuracies.get(item.method, 0.5)) for item in grids.items(grid)]
