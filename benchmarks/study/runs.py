"""The finished runs of a study, as tables and plots ask for them.

Reads runs.jsonl (or gathers it from a work directory); knows the grid's names, computes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import grid as grids

Record = dict[str, Any]


@dataclass(frozen=True)
class Runs:
    """records: one a finished run. grid: what was to be run."""

    records: Sequence[Record]
    grid: Mapping[str, Any]

    def of(self, part: str, method: str) -> list[Record]:
        return sorted(
            (r for r in self.records if r["part"] == part and r["method"] == method), key=lambda r: int(r["seed"])
        )

    def labels(self) -> dict[str, str]:
        """By method of the main comparison, its name for people."""
        return {name: m["label"] for name, m in self.grid["methods"].items()}

    def planned(self, part: str) -> int:
        return sum(item.part == part for item in grids.items(self.grid))

    def finished(self, part: str) -> int:
        return sum(r["part"] == part for r in self.records)


def gather(work: Path, file: Path) -> None:
    """WORK/results/*.json into one file, a line a run."""
    records = [json.loads(path.read_text()) for path in sorted((work / "results").glob("*.json"))]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(r) + "\n" for r in records))


def read(file: Path, grid: Mapping[str, Any]) -> Runs:
    return Runs([json.loads(line) for line in file.read_text().splitlines()], grid)
