"""The queue of the study's runs: several at once, paused while a given file exists, and resumable.

A finished run has one JSON file in WORK/results and is not run again. Tuned learning rates come from these files.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from . import grid as grids
from . import prepare, processes
from . import record as records
from .grid import PlannedRun

POLL_S = 0.5  # seconds between two looks at the processes and the pause file


class RunQueue:
    """The runs of a grid that have no result in a work directory yet; `run` runs all of them."""

    def __init__(self, work: Path, grid: Mapping[str, Any], pause: Path, jobs: int) -> None:
        """pause: while this file exists, no run starts and running ones are stopped. jobs: the most runs at once."""
        self.work, self.grid, self.pause, self.jobs = work, grid, pause, jobs
        self.results, self.logs, self.runs = (work / name for name in ("results", "logs", "runs"))
        for directory in (self.results, self.logs, self.runs):
            directory.mkdir(parents=True, exist_ok=True)
        self.waiting = [run for run in grids.list_runs(grid) if not self.result_file(run).exists()]
        self.running: list[processes.RunProcess] = []
        self.failed: list[str] = []

    def result_file(self, run: PlannedRun) -> Path:
        return self.results / f"{run.name}.json"

    def run(self) -> None:
        """Run all waiting runs. If this ends early, for example by a signal, the running ones are killed.

        Raises RuntimeError if runs failed, or cannot start since the tuning of their learning rate failed.
        """
        processes.import_everything()
        try:
            while self.waiting or self.running:
                self._collect_ended()
                paused = self.pause.exists()
                for process in self.running:
                    process.pause(paused)
                    process.lower_children()
                if not paused and len(self.running) < self.jobs and not self._start_next() and not self.running:
                    break
                time.sleep(POLL_S)
        finally:
            for process in self.running:
                process.kill()
        if self.failed or self.waiting:
            names = ", ".join([*self.failed, *(run.name for run in self.waiting)])
            raise RuntimeError(f"these runs failed or could not start; the logs are in {self.logs}: {names}")

    def _start_next(self) -> bool:
        """Start the first waiting run whose learning rate is known. Returns False if there is none."""
        tuning = self._read_tuning_records()
        # A result may have been copied into the work directory in the meantime.
        self.waiting = [run for run in self.waiting if not self.result_file(run).exists()]
        for run in self.waiting:
            rate = run.learning_rate
            if rate is None:
                rate = self._choose_learning_rate(run.tuned_method, tuning)
            if rate is not None:
                self.waiting.remove(run)
                job = partial(execute_run, run, self.work, rate, self.result_file(run), self.runs / run.name)
                self.running.append(processes.fork_run(run.name, job, self.logs / f"{run.name}.log"))
                return True
        return False

    def _read_tuning_records(self) -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in self.results.glob(f"{grids.TUNING}.*.json")]

    def _choose_learning_rate(self, method: str, tuning: Sequence[dict[str, Any]]) -> float | None:
        return grids.choose_learning_rate(method, tuning, len(self.grid["tuning"]["learning_rates"]))

    def _collect_ended(self) -> None:
        """Remove the processes that have ended from `running`, note failed ones, and print a line for each."""
        for process in [*self.running]:
            pid, status = os.waitpid(process.pid, os.WNOHANG)
            if not pid:
                continue
            self.running.remove(process)
            if code := os.waitstatus_to_exitcode(status):
                self.failed.append(process.name)
                print(f"{process.name} failed with exit code {code}", file=sys.stderr, flush=True)
            else:
                now = time.strftime("%H:%M:%S")
                print(f"{now} {process.name} is finished; {len(self.waiting)} runs wait", flush=True)


def execute_run(run: PlannedRun, work: Path, learning_rate: float, result: Path, directory: Path) -> None:
    """Train and evaluate in the run directory `directory`, write the record to `result`, and remove the directory."""
    shutil.rmtree(directory, ignore_errors=True)
    began = time.monotonic(), time.process_time()
    record: dict[str, Any] = {"part": run.part, "method": run.method, "of": run.tuned_method, "seed": run.seed}
    record["learning_rate"] = learning_rate
    record |= _train_and_evaluate(run, run.arguments(work, learning_rate), directory)
    wall, processor = (now - then for now, then in zip((time.monotonic(), time.process_time()), began, strict=True))
    record |= {"seconds": round(wall, 1), "processor_seconds": round(processor, 1), "version": read_commit()}
    temporary = result.with_suffix(".part")
    temporary.write_text(json.dumps(record))
    temporary.rename(result)
    shutil.rmtree(directory)


def _train_and_evaluate(run: PlannedRun, arguments: list[str], directory: Path) -> dict[str, Any]:
    """Run `nemo-disco train` and `nemo-disco evaluate` in this process, and return the record's results.

    They are `curve` and `evaluation`; instead of the latter there is `failed`, the reason, if training ended with an
    error, as it does when the policy diverges. A run of BASE is not trained and has no curve.
    """
    from nemo_disco import cli

    results: dict[str, Any] = {}
    if run.part != grids.BASE:
        code = cli.main(["train", *arguments, f"exp_manager.explicit_log_dir={directory}"])
        results["curve"] = records.read_curves(directory)
        if code:
            # A policy that diverged is a result; its curve ends there.
            return results | {"failed": f"training ended with code {code}"}
        arguments = [*arguments, f"model.path={directory / 'export'}"]
    if cli.main(["evaluate", *arguments, f"exp_manager.explicit_log_dir={directory / 'after'}"]):
        raise RuntimeError(f"the evaluation of {run.name} failed; the lines above say why")
    return results | {"evaluation": records.read_evaluation(directory / "after" / "evaluation")}


def read_commit() -> str:
    """The short name of the repository's present commit; "" outside a git checkout."""
    command = ["git", "-C", str(grids.HERE), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def run_study(work: Path, grid: Mapping[str, Any], pause: Path, jobs: int) -> None:
    """Prepare the work directory if that is not done yet, and run all runs of the grid that have no result."""
    work.mkdir(parents=True, exist_ok=True)
    prepare.prepare_inputs(work)
    RunQueue(work, grid, pause, jobs).run()
