"""The records of a grid's finished runs, and how to select them by part and method.

Reads a results file. Computes no statistics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import grid as grids
from .results_file import Record, read_records


@dataclass(frozen=True)
class FinishedRuns:
    """The records of the finished runs of a study, and the grid with all planned ones."""

    records: Sequence[Record]
    grid: Mapping[str, Any]

    def select(self, part: str, method: str) -> list[Record]:
        """The records of a method in a part of the study, in the order of their seeds."""
        return sorted(
            (r for r in self.records if r["part"] == part and r["method"] == method), key=lambda r: int(r["seed"])
        )

    def method_labels(self) -> dict[str, str]:
        """Method of the main comparison -> its name in tables and figures."""
        return {name: m["label"] for name, m in self.grid["methods"].items()}

    def count_planned(self, part: str) -> int:
        return sum(run.part == part for run in grids.list_runs(self.grid))

    def count_finished(self, part: str) -> int:
        return sum(r["part"] == part for r in self.records)


def read_runs(file: Path, grid: Mapping[str, Any]) -> FinishedRuns:
    return FinishedRuns(read_records(file, grids.name_record), grid)
