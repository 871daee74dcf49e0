"""Reading run directories for the report: what is there is read, what is missing or torn is noted, never guessed.

Touches only files of the run directories it is given, read only.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_disco.evaluation.result import EvaluationResult, read_evaluation
from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.rundir import RunDirectory

ROLLOUT_FILE = re.compile(r"step_(\d+)\.jsonl$")


@dataclass
class Run:
    """One run. metrics: one mapping a step, by step; config: dotted keys; rollouts: (step, the file's objects)."""

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
        """[steps] a metric's values; None where it is absent or not finite."""
        return [finite(line.get(name)) for line in self.metrics]

    @property
    def names(self) -> list[str]:
        """The metrics that hold at least one number, in order of appearance."""
        found = dict.fromkeys(k for line in self.metrics for k, v in line.items() if finite(v) is not None)
        return [name for name in found if name != "step"]

    @property
    def delta(self) -> float | None:
        """The KL limit, as logged, else as configured."""
        logged = [v for v in self.series("constraint/delta") if v is not None]
        return logged[-1] if logged else finite(self.config.get("algorithm.constraint.delta"))


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Raises UserError if there is none, or if one of them is not a run directory."""
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
    run.evaluations = _read_evaluations(run)
    run.rollouts = list(_read_rollouts(run))
    if not run.rollouts:
        run.notes.append("No saved rollouts: exp_manager.saved_rollouts says how many a step are kept.")
    return run


def _labels(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    parts = [path.resolve().parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(p[-depth:]) for p in parts]
        if len(set(labels)) == len(labels):
            return labels
    raise UserError(f"the same run directory twice: {', '.join(map(str, paths))}")


def _read_metrics(run: Run) -> list[dict[str, Any]]:
    path = run.directory.metrics
    if not path.exists():
        run.notes.append("No metrics.jsonl: no curves for this run.")
        return []
    # A step that appears twice counts as it was written last.
    by_step = {line["step"]: line for line in _json_lines(path, run.notes) if isinstance(line.get("step"), int)}
    if not by_step:
        run.notes.append("metrics.jsonl holds no step yet.")
    return [by_step[step] for step in sorted(by_step)]


def _read_config(run: Run) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    path = run.directory.config
    if not path.exists():
        run.notes.append("No config.yaml: the configuration is unknown.")
        return {}
    try:
        tree = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        run.notes.append(f"config.yaml cannot be read ({type(error).__name__}): the configuration is unknown.")
        return {}
    return dict(_flatten(tree))


def _read_evaluations(run: Run) -> list[EvaluationResult]:
    results = []
    for path in run.directory.evaluation.glob("*.json"):
        try:
            results.append(read_evaluation(path))
        except UserError as error:
            run.notes.append(f"Left out: {error}")
    if not results:
        run.notes.append("No evaluation results: no accuracy table for this run.")
    return sorted(results, key=lambda r: (r.name, r.step))


def _read_rollouts(run: Run) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    files = [(int(m[1]), p) for p in run.directory.rollouts.glob("*.jsonl") if (m := ROLLOUT_FILE.search(p.name))]
    for step, path in sorted(files):
        yield step, _json_lines(path, run.notes)


def _json_lines(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The JSON objects of a file, one a line; every line that is none is noted."""
    objects = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            try:
                value = json.loads(line)
            except ValueError:
                value = None
            if isinstance(value, dict):
                objects.append(value)
            else:
                torn = "" if line.endswith("\n") else " (torn: the run died, or is still writing it)"
                notes.append(f"{path.name}: line {number} is not a JSON object and is left out{torn}.")
    return objects


def _flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    elif prefix:
        yield prefix, tree


def finite(value: Any) -> float | None:
    """The value as a number, or None if it is not a finite one."""
    return float(value) if isinstance(value, (bool, int, float)) and math.isfinite(value) else None
