"""The planned runs of the study, in their order, with the command line of each; and the choice of learning rates.

Reads no file but grid.yaml and starts nothing. The study has five parts: BASE (the model that training starts from,
evaluated without training), TUNING (learning rates), MAIN (the methods), ABLATIONS, and LENGTH (accuracy against
length).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
GRID = HERE / "grid.yaml"
BASE, TUNING, MAIN, ABLATIONS, LENGTH = "base", "tuning", "main", "ablations", "length"

Record = Mapping[str, Any]


@dataclass(frozen=True)
class PlannedRun:
    """One run of the study: a training and its evaluation, or in the part BASE an evaluation alone."""

    part: str
    method: str
    seed: int
    tuned_method: str  # the method whose tuned learning rate this run takes; "" in the part BASE
    overrides: tuple[str, ...]
    learning_rate: float | None = None  # None: the tuned one

    @property
    def name(self) -> str:
        rate = "" if not self.learning_rate else f".lr_{self.learning_rate:g}"
        return f"{self.part}.{self.method}{rate}.seed_{self.seed}"

    def arguments(self, work: Path, learning_rate: float) -> list[str]:
        """The arguments of `nemo-disco train` and `nemo-disco evaluate`, without the run's directory.

        work: the work directory, in which prepare.py wrote the model and the questions.
        """
        held_out = "development" if self.part == TUNING else "test"
        return [
            *("--config-name", "run", "--config-path", str(HERE)),
            f"model.path={work / 'model'}",
            f"data.train_files=[{work / 'train.jsonl'}]",
            f"evaluation.files=[{work / held_out}.jsonl]",
            f"model.optim.lr={learning_rate:g}",
            f"seed={self.seed}",
            *self.overrides,
        ]


def load_grid(path: Path = GRID) -> dict[str, Any]:
    grid: dict[str, Any] = yaml.safe_load(path.read_text())
    return grid


def list_runs(grid: Mapping[str, Any]) -> list[PlannedRun]:
    """All runs of the grid in order: the base model's evaluation, tuning, then each other part seed by seed."""
    methods, common = grid["methods"], tuple(grid.get("run", ()))
    runs = [PlannedRun(BASE, "warm_start", grid["tuning"]["seed"], "", common, 0.0)]
    runs += [
        PlannedRun(TUNING, name, grid["tuning"]["seed"], name, (*common, *m["overrides"]), float(rate))
        for name, m in methods.items()
        for rate in grid["tuning"]["learning_rates"]
    ]
    for part in (MAIN, ABLATIONS, LENGTH):
        section = grid.get(part, {"seeds": []})
        runs += [
            PlannedRun(part, name, seed, tuned_method, (*common, *overrides))
            for seed in section["seeds"]
            for name, tuned_method, overrides in _list_variants(methods, section)
        ]
    return runs


def _list_variants(methods: Mapping[str, Any], section: Mapping[str, Any]) -> list[tuple[str, str, list[str]]]:
    """(name, tuned method, overrides) of each run of a part at one seed.

    A section of the grid without `variants` has a run for every method.
    """
    if "variants" not in section:
        return [(name, name, m["overrides"]) for name, m in methods.items()]
    return [
        (f"{v['of']}.{v['name']}", v["of"], [*methods[v["of"]]["overrides"], *v["overrides"]])
        for v in section["variants"]
    ]


def choose_learning_rate(method: str, records: Sequence[Record], count: int) -> float | None:
    """The learning rate of a method's tuning runs with the highest Pass@1, the smaller one if two are equal.

    None until all `count` tuning runs of the method are among the records.
    """
    tuning = [r for r in records if r["part"] == TUNING and r["method"] == method]
    if len(tuning) < count:
        return None
    return float(max(tuning, key=lambda r: (pass_at_1(r), -r["learning_rate"]))["learning_rate"])


def pass_at_1(record: Record) -> float:
    """Pass@1 of a run's evaluation: the share of right samples over all held-out questions; 0 if training failed."""
    if "failed" in record:
        return 0.0
    correct = record["evaluation"]["correct"]
    return float(sum(correct) / len(correct) / record["evaluation"]["samples"])
