"""Sets aside files that an earlier process of a run wrote beyond the step from which this process resumes: they would
be taken for results of this process.

Moves and removes files of one run directory, under its lock.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Sequence
from pathlib import Path

from nemo_disco.runtime.files import first_free, remove, writing
from nemo_disco.runtime.rundir import RunDirectory, read_model_record
from nemo_disco.runtime.sinks import MLFLOW_ID, WANDB_ID

EARLIER = "earlier"
_ROLLOUTS = re.compile(r"step_(?P<step>\d+)\.jsonl")
_EVALUATION = re.compile(r"(?P<set>.+?)\.step_(?P<step>\d+)(\.samples)?(\.replaced|\.rank_\d+)?\.jsonl?")


def set_aside(run: RunDirectory, step: int, sets: Collection[str]) -> str:
    """Clear files of steps beyond `step`. Returns a line for the log, or "". Raises UserError for an error of the disk.

    After a checkpoint they are removed, since these steps are taken again; but export/, which took the whole run, is
    moved to RUN/earlier/N, and best/ is left to algorithms/best_weights.py. At step 0 there is no checkpoint, so all
    files are of another run, perhaps one that was killed early, and are moved there too. Evaluations before training
    stay if their set is one of `sets` (as named in file names): each file records its weights.
    """
    with writing(run.path):
        evaluations = [p for p in _entries(run.evaluation) if _is_stale(_EVALUATION, p, step, sets)]
        rollouts = [p for p in _entries(run.rollouts) if _is_stale(_ROLLOUTS, p, step)]
        if step:
            for path in (*evaluations, *rollouts):
                remove(path)
            names = ", ".join(f"{path.parent.name}/{path.name}" for path in (*evaluations, *rollouts)[:3])
            more = len(evaluations) + len(rollouts)
            notes = [f"{more} files of an earlier process that went beyond step {step} were removed ({names} ...)"]
            export_record = read_model_record(run.export)
            if export_record is not None and export_record["step"] > step:
                place = _move(run, [run.export]) / run.export.name
                notes.append(f"{run.export} is of step {export_record['step']}: it is now {place}")
            return "; ".join(notes if more else notes[1:])
        files = [run.metrics, run.config, run.report, *_entries(run.tensorboard)]
        files += [run.path / WANDB_ID, run.path / MLFLOW_ID]
        results = [*evaluations, *rollouts, run.best, run.export, *run.path.glob("best.*")]
        if not any(path.exists() for path in results) and not (run.metrics.is_file() and run.metrics.stat().st_size):
            return ""
        place = _move(run, [*files, *results])
    return f"no checkpoint in {run.checkpoints}: training starts at step 0; files of another run are now in {place}"


def _move(run: RunDirectory, paths: Sequence[Path]) -> Path:
    """Move the paths that exist to RUN/earlier/N, with the first free number N. Returns that directory."""
    place = first_free(run.path / EARLIER / str(n) for n in itertools.count(1))
    for path in paths:
        if path.exists() or path.is_symlink():
            target = place / path.relative_to(run.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
    return place


def _entries(directory: Path) -> list[Path]:
    return sorted(directory.iterdir()) if directory.is_dir() else []


def _is_stale(name: re.Pattern[str], path: Path, step: int, sets: Collection[str] | None = None) -> bool:
    match = name.fullmatch(path.name)
    if match is None:
        return False
    return int(match["step"]) > step or (step == 0 and sets is not None and match["set"] not in sets)
