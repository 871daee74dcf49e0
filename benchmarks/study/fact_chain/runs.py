"""The planned runs of the fact-chain arm, in their order, and the execution of one of them.

A cell is an objective with a constraint. Tuning runs are scored on development questions, main ones on test questions.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from nemo_disco.algorithms import build_objective

from ..candidates import Candidate, list_candidates
from ..results_file import Record, read_commit
from .policy import FactPolicy, warm_start
from .task import Questions, draw_sets
from .training import Settings, Training, evaluate

GRID = Path(__file__).parent / "grid.yaml"
TUNING, MAIN = "tuning", "main"
Grid = Mapping[str, Any]


class OtherSettingsError(ValueError):
    """A record whose run had other settings than the grid, or another policy at the start than its neighbours."""


@dataclass(frozen=True)
class PlannedRun:
    """One training and its evaluation. candidate: None for the one that tuning chooses."""

    part: str
    objective: str
    constraint: str
    start: int
    candidate: Candidate | None = None

    @property
    def cell(self) -> tuple[str, str]:
        return self.objective, self.constraint

    @property
    def name(self) -> str:
        candidate = "" if self.candidate is None else f".{self.candidate}"
        return f"{self.part}.{self.objective}.{self.constraint}{candidate}.start_{self.start}"


def load_grid(path: Path = GRID) -> dict[str, Any]:
    grid: dict[str, Any] = yaml.safe_load(path.read_text())
    return grid


def list_cells(grid: Grid) -> list[tuple[str, str]]:
    """(objective, constraint) of all cells, constraint after constraint."""
    return [(objective, constraint) for constraint in grid["constraints"] for objective in grid["objectives"]]


def list_cell_candidates(grid: Grid, cell: tuple[str, str]) -> list[Candidate]:
    free = grid["constraints"][cell[1]]["settings"]["kind"] == "none"
    return list_candidates(grid["tuning"]["candidates"]["unconstrained" if free else "constrained"])


def list_runs(grid: Grid) -> list[PlannedRun]:
    """All runs in order: the tuning of cell after cell, then start after start."""
    cells = list_cells(grid)
    tuning = [
        PlannedRun(TUNING, *cell, start, candidate)
        for cell in cells
        for candidate in list_cell_candidates(grid, cell)
        for start in grid["tuning"]["starts"]
    ]
    return tuning + [PlannedRun(MAIN, *cell, start) for start in grid["main"]["starts"] for cell in cells]


def choose_candidate(grid: Grid, cell: tuple[str, str], records: Sequence[Record]) -> Candidate | None:
    """The candidate with the highest mean avg@k over the tuning starts; the earlier one of equals.

    None until all tuning runs of the cell are among the records.
    """
    scores = score_candidates(grid, cell, records)
    if any(score is None for score in scores.values()):
        return None
    return max(scores, key=lambda candidate: scores[candidate] or 0.0)


def score_candidates(grid: Grid, cell: tuple[str, str], records: Sequence[Record]) -> dict[Candidate, float | None]:
    """Candidate -> its mean avg@k over the tuning starts; None until all of them have a record."""
    by_name = {r["name"]: r for r in records}
    starts, scores = grid["tuning"]["starts"], {}
    for candidate in list_cell_candidates(grid, cell):
        names = [PlannedRun(TUNING, *cell, start, candidate).name for start in starts]
        done = [by_name[name] for name in names if name in by_name]
        mean = float(np.mean([np.mean(r["correct"]) / r["samples"] for r in done])) if done else 0.0
        scores[candidate] = mean if len(done) == len(starts) else None
    return scores


def identify_settings(grid: Grid, cell: tuple[str, str]) -> str:
    """A digest of all settings of a cell's runs except learning rate and beta."""
    common = {key: grid[key] for key in ("start", "questions", "evaluation_samples", "training")}
    parts = [common, grid["objectives"][cell[0]]["settings"], grid["constraints"][cell[1]]["settings"]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def check_records(grid: Grid, records: Sequence[Record]) -> None:
    """Raise OtherSettingsError unless each record is of these settings, and each start began with the same weights."""
    weights: dict[int, str] = {}
    for record in records:
        expected = identify_settings(grid, (record["objective"], record["constraint"]))
        if record["settings"] != expected:
            raise OtherSettingsError(
                f"the record of {record['name']} is of other settings than the grid's; give another --results file"
            )
        if weights.setdefault(record["start"], record["start_weights"]) != record["start_weights"]:
            raise OtherSettingsError(
                f"the run {record['name']} began with other weights than the other runs of start {record['start']}, as "
                "happens on another machine; remove the records of this start, and they are repeated"
            )


def execute_run(run: PlannedRun, candidate: Candidate, grid: Grid) -> Record:
    """Train and evaluate; returns the record. A policy that diverged has no right response."""
    began = time.process_time()
    start, weights = _make_start(run.start, **grid["start"])
    test, development, train = _draw_questions(**grid["questions"])
    training = Training(
        start,
        build_objective(_objective_settings(run.cell, candidate, grid)),
        candidate.learning_rate,
        train,
        Settings(**grid["training"]),
        run.start,
    )
    held_out, samples = (development if run.part == TUNING else test), grid["evaluation_samples"]
    diverged = training.run()
    correct = evaluate(training.policy, held_out, samples, run.start) if diverged is None else [0] * len(held_out)
    return {
        "name": run.name,
        "part": run.part,
        "objective": run.objective,
        "constraint": run.constraint,
        "start": run.start,
        "learning_rate": candidate.learning_rate,
        "beta": candidate.beta,
        "settings": identify_settings(grid, run.cell),
        "start_weights": weights,
        "start_accuracy": float(np.mean(evaluate(start, held_out, samples, run.start)) / samples),
        "samples": samples,
        "correct": correct,
        "diverged": diverged,
        "never_solved": round(training.never_solved, 5),
        "curve": training.curves(),
        "processor_seconds": round(time.process_time() - began, 1),
        "version": read_commit(),
    }


def run_all(grid: Grid, records: list[Record]) -> Iterator[Record]:
    """Execute each run of the grid that has no record, in order; yields the records and adds them to `records`."""
    check_records(grid, records)
    for run in list_runs(grid):
        if any(r["name"] == run.name for r in records):
            continue
        candidate = run.candidate or choose_candidate(grid, run.cell, records)
        assert candidate is not None, "tuning runs come first"
        records.append(execute_run(run, candidate, grid))
        yield records[-1]


def _objective_settings(cell: tuple[str, str], candidate: Candidate, grid: Grid) -> dict[str, Any]:
    constraint = dict(grid["constraints"][cell[1]]["settings"])
    if candidate.beta is not None:
        constraint["beta"] = candidate.beta
    return {**grid["objectives"][cell[0]]["settings"], "constraint": constraint}


@lru_cache(maxsize=4)
def _make_start(seed: int, least: float, most: float, steps: int) -> tuple[FactPolicy, str]:
    """(the start's policy, a digest of its weights)."""
    policy = warm_start(seed, least, most, steps)
    buffer = io.BytesIO()
    for weight in policy.state_dict().values():
        buffer.write(weight.numpy().tobytes())
    return policy, hashlib.sha256(buffer.getvalue()).hexdigest()[:12]


@lru_cache(maxsize=1)
def _draw_questions(test: int, development: int, train: int) -> list[Questions]:
    """The questions for test, development and training; none is in two of them."""
    torch.set_num_threads(1)
    return draw_sets((test, development, train))
