"""The runs of the study, from grid.yaml: items in their order, and the command line of each.

Pure: reads the grid and, for the learning rates, the finished runs it is given. Starts nothing.
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
class Item:
    """One run, or of the part BASE an evaluation alone.

    of: the tuned method whose learning rate it takes; learning_rate: where it does not take one.
    """

    part: str
    method: str
    seed: int
    of: str
    overrides: tuple[str, ...]
    learning_rate: float | None = None

    @property
    def name(self) -> str:
        rate = "" if not self.learning_rate else f".lr_{self.learning_rate:g}"
        return f"{self.part}.{self.method}{rate}.seed_{self.seed}"

    def arguments(self, work: Path, learning_rate: float) -> list[str]:
        """Overrides of `train` and `evaluate`; work: where prepare.py put the model and the questions."""
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


def load(path: Path = GRID) -> dict[str, Any]:
    grid: dict[str, Any] = yaml.safe_load(path.read_text())
    return grid


def items(grid: Mapping[str, Any]) -> list[Item]:
    """Every run, in order: what training starts from, tuning, then each part seed by seed."""
    methods, common = grid["methods"], tuple(grid.get("run", ()))
    found = [Item(BASE, "warm_start", grid["tuning"]["seed"], "", common, 0.0)]
    found += [
        Item(TUNING, name, grid["tuning"]["seed"], name, (*common, *m["overrides"]), float(rate))
        for name, m in methods.items()
        for rate in grid["tuning"]["learning_rates"]
    ]
    for part in (MAIN, ABLATIONS, LENGTH):
        section = grid.get(part, {"seeds": []})
        found += [
            Item(part, name, seed, of, (*common, *overrides))
            for seed in section["seeds"]
            for name, of, overrides in _variants(methods, section)
        ]
    return found


def _variants(methods: Mapping[str, Any], section: Mapping[str, Any]) -> list[tuple[str, str, list[str]]]:
    """(name, tuned method, overrides) of each run of a part at one seed; without variants, every method itself."""
    if "variants" not in section:
        return [(name, name, m["overrides"]) for name, m in methods.items()]
    return [
        (f"{v['of']}.{v['name']}", v["of"], [*methods[v["of"]]["overrides"], *v["overrides"]])
        for v in section["variants"]
    ]


def best_learning_rate(method: str, tuned: Sequence[Record], count: int) -> float | None:
    """The one of `count` learning rates with the highest Pass@1 (the smaller of equals); None while one is missing."""
    mine = [r for r in tuned if r["part"] == TUNING and r["method"] == method]
    if len(mine) < count:
        return None
    return float(max(mine, key=lambda r: (pass_at_1(r), -r["learning_rate"]))["learning_rate"])


def pass_at_1(record: Record) -> float:
    """avg@k on the held-out questions; 0 for a run that ended by its divergence."""
    if "failed" in record:
        return 0.0
    correct = record["evaluation"]["correct"]
    return float(sum(correct) / len(correct) / record["evaluation"]["samples"])
