"""Reading of run directories for the report. Each missing or damaged file leaves a note; no value is made up.

Only reads, and only files of the run directories that the caller names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_disco.config.safe_yaml import read_yaml
from nemo_disco.evaluation.result import EvaluationResult, read_evaluations
from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.rundir import RunDirectory
from nemo_disco.runtime.saved_files import FileError, read_json_lines
from nemo_disco.runtime.sinks import MetricsLine

MAX_NOTED = 3  # damaged lines of a file that get a note each
ROLLOUT_FILE = re.compile(r"step_(\d+)\.jsonl$")


@dataclass
class Run:
    """A run's saved data. metrics: a mapping for each step, ascending; config: by dotted keys; rollouts: (step, its
    rollouts); notes: messages on missing and damaged parts."""

    label: str
    directory: RunDirectory
    metrics: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    evaluations: list[EvaluationResult] = field(default_factory=list)
    rollouts: list[tuple[int, list[dict[str, Any]]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def steps(self) -> list[int]:
        return [line["step"] for line in self.metrics]

    def series(self, name: str) -> list[float | None]:
        """[steps] values of a metric; None where it is absent or not finite."""
        return [to_finite(line.get(name)) for line in self.metrics]

    @property
    def names(self) -> list[str]:
        """Names of the metrics with at least one finite value, in order of appearance."""
        names = dict.fromkeys(k for line in self.metrics for k, v in line.items() if to_finite(v) is not None)
        return [name for name in names if name != "step"]

    @property
    def delta(self) -> float | None:
        """The KL limit: the last logged one, else the configured one."""
        logged = [v for v in self.series("constraint/delta") if v is not None]
        return logged[-1] if logged else to_finite(self.config.get("algorithm.constraint.delta"))


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The data of each run directory. Raises UserError for no paths, and for a path that is not a run directory."""
    if not paths:
        raise UserError("no run directory given; nemo-disco report RUN [RUN ...]")
    return [_read_run(path, label) for path, label in zip(paths, _labels(paths), strict=True)]


def _read_run(path: Path, label: str) -> Run:
    if not path.is_dir():
        raise UserError(f"{path} is not a directory; give the run directory (exp_manager.explicit_log_dir)")
    run = Run(label, RunDirectory(path))
    parts = (run.directory.metrics, run.directory.config, run.directory.rollouts, run.directory.evaluation)
    if not any(part.exists() for part in parts):
        raise UserError(f"{path} is not a run directory: none of {', '.join(part.name for part in parts)} is in it")
    run.metrics = _read_metrics(run)
    run.config = _read_config(run)
    run.evaluations = read_evaluations(run.directory.evaluation, run.notes.append)
    if not run.evaluations:
        run.notes.append("No evaluation results: no accuracy table for this run.")
    files = [(int(m[1]), p) for p in run.directory.rollouts.glob("*.jsonl") if (m := ROLLOUT_FILE.search(p.name))]
    run.rollouts = [(step, _json_lines(file, run.notes, dict[str, Any])) for step, file in sorted(files)]
    if not run.rollouts:
        run.notes.append("No saved rollouts: exp_manager.saved_rollouts sets how many each step keeps.")
    return run


def _labels(paths: Sequence[Path]) -> list[str]:
    """The shortest endings of the paths that are all different."""
    parts = [path.resolve().parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(p[-depth:]) for p in parts]
        if len(set(labels)) == len(labels):
            return labels
    raise UserError(f"the same run directory twice: {', '.join(map(str, paths))}; name each once")


def _read_metrics(run: Run) -> list[dict[str, Any]]:
    path = run.directory.metrics
    if not path.exists():
        run.notes.append("No metrics.jsonl: no curves for this run.")
        return []
    # Of a step that appears twice, the last line counts.
    by_step = {line["step"]: line for line in _json_lines(path, run.notes, MetricsLine)}
    if not by_step:
        run.notes.append("metrics.jsonl holds no step yet.")
    return [by_step[step] for step in sorted(by_step)]


def _read_config(run: Run) -> dict[str, Any]:
    path = run.directory.config
    if not path.exists():
        run.notes.append("No config.yaml: the configuration is unknown.")
        return {}
    try:
        return dict(_flatten(read_yaml(path)))
    except UserError as fault:
        run.notes.append(f"{fault}: the configuration is unknown.")
        return {}


def _json_lines(path: Path, notes: list[str], shape: type[Any]) -> list[dict[str, Any]]:
    """The JSON objects of a file, one in each line; `notes` gets messages on the damaged lines, which are left out."""
    objects, faults = [], 0
    try:
        for line in read_json_lines(path, shape):
            if not line.fault:
                objects.append(line.value)
            elif (faults := faults + 1) <= MAX_NOTED:
                cause = "" if line.raw.endswith(b"\n") else " (incomplete: the run died, or is still writing it)"
                notes.append(f"{path.name}: line {line.number} is left out{cause}: {line.fault}.")
    except FileError as fault:
        notes.append(f"{path.name}: {fault.problem}.")
    if faults > MAX_NOTED:
        notes.append(f"{path.name}: {faults:,} lines in all are left out.")
    return objects


def _flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    elif prefix:
        yield prefix, tree


def to_finite(value: Any) -> float | None:
    """The value as a float, or None if it is not a finite number."""
    small_int = isinstance(value, int) and abs(value) < 2**1000  # an int in JSON may be larger than any float
    return float(value) if small_int or (isinstance(value, float) and math.isfinite(value)) else None
