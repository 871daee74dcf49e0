"""The planned runs of a grid, in their order, with the command line of each; and the choice of tuned candidates.

Reads no file but a grid and starts nothing. A grid has up to five parts: BASE (the models that training starts from,
evaluated without training), TUNING (learning rates and betas), MAIN (the methods), ABLATIONS, and LENGTH (accuracy
against length).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .candidates import Candidate, list_candidates

HERE = Path(__file__).parent
GRID = HERE / "grid.yaml"
RESULTS = HERE.parent / "results"
BASE, TUNING, MAIN, ABLATIONS, LENGTH = "base", "tuning", "main", "ablations", "length"

Record = Mapping[str, Any]
Grid = Mapping[str, Any]


@dataclass(frozen=True)
class PlannedRun:
    """One run of the study: a training and its evaluation, or in the part BASE an evaluation alone."""

    part: str
    method: str
    seed: int
    tuned_method: str  # the method whose tuned candidate this run takes; "" in the part BASE
    overrides: tuple[str, ...]
    candidate: Candidate | None = None  # None: the tuned one

    @property
    def name(self) -> str:
        return _name(self.part, self.method, self.candidate, self.seed)

    def arguments(self, work: Path, model: Path, candidate: Candidate) -> list[str]:
        """The arguments of `nemo-disco train` and `nemo-disco evaluate`, without the run's directory.

        work: the work directory, in which prepare.py wrote the questions. model: that of the policy at the start.
        """
        held_out = "development" if self.part == TUNING else "test"
        return [
            *("--config-name", "run", "--config-path", str(HERE)),
            f"model.path={model}",
            f"data.train_files=[{work / 'train.jsonl'}]",
            f"evaluation.files=[{work / held_out}.jsonl]",
            f"model.optim.lr={candidate.learning_rate:g}",
            f"seed={self.seed}",
            *self.overrides,
            *([] if candidate.beta is None else [f"algorithm.constraint.beta={candidate.beta:g}"]),
        ]


def name_record(record: Record) -> str:
    """The name of the planned run that a record is of."""
    candidate = Candidate(record["learning_rate"], record.get("beta")) if record["part"] == TUNING else None
    return _name(record["part"], record["method"], candidate, record["seed"])


def _name(part: str, method: str, candidate: Candidate | None, seed: int) -> str:
    return f"{part}.{method}{'' if candidate is None else f'.{candidate}'}.seed_{seed}"


def load_grid(path: Path = GRID) -> dict[str, Any]:
    grid: dict[str, Any] = yaml.safe_load(path.read_text())
    return grid


def list_runs(grid: Grid) -> list[PlannedRun]:
    """All runs of the grid in order: tuning, then each other part seed by seed; first the evaluation of each start."""
    methods, common = grid["methods"], tuple(grid.get("run", ()))
    tuning_seed = grid["tuning"]["seed"]
    runs = [PlannedRun(BASE, "warm_start", tuning_seed, "", common)]
    runs += [
        PlannedRun(TUNING, name, tuning_seed, name, (*common, *m["overrides"]), candidate)
        for name, m in methods.items()
        for candidate in list_method_candidates(grid, name)
    ]
    for part in (MAIN, ABLATIONS, LENGTH):
        section = grid.get(part, {"seeds": []})
        for seed in section["seeds"]:
            if grid.get("setup", {}).get("start_per_seed"):
                runs.append(PlannedRun(BASE, "warm_start", seed, "", common))
            runs += [
                PlannedRun(part, name, seed, tuned_method, (*common, *overrides))
                for name, tuned_method, overrides in _list_variants(methods, section)
            ]
    return list(dict.fromkeys(runs))


def list_method_candidates(grid: Grid, method: str) -> list[Candidate]:
    """The candidates of a method's tuning: its own `tuning`, else the learning rates of the grid's."""
    return list_candidates(grid["methods"][method].get("tuning", grid["tuning"]))


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


def choose_candidate(method: str, records: Sequence[Record], candidates: Sequence[Candidate]) -> Candidate | None:
    """The candidate of a method's tuning runs with the highest Pass@1; of equals, the smaller learning rate and beta.

    None until the tuning runs of all candidates are among the records. Other candidates' runs do not count.
    """
    scores = score_candidates(method, records)
    if not scores.keys() >= set(candidates):
        return None
    return max(candidates, key=lambda c: (scores[c], -c.learning_rate, -(c.beta or 0.0)))


def score_candidates(method: str, records: Sequence[Record]) -> dict[Candidate, float]:
    """Pass@1 of each of a method's tuning runs."""
    tuning = [r for r in records if r["part"] == TUNING and r["method"] == method]
    return {Candidate(float(r["learning_rate"]), r.get("beta")): pass_at_1(r) for r in tuning}


def pass_at_1(record: Record) -> float:
    """Pass@1 of a run's evaluation: the share of right samples over all held-out questions; 0 if training failed."""
    if "failed" in record:
        return 0.0
    correct = record["evaluation"]["correct"]
    return float(sum(correct) / len(correct) / record["evaluation"]["samples"])
