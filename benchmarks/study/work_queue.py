"""The queue of a grid's runs: several at once, paused while a given file exists, and resumable.

A finished run has one record in the results file, which is committed, and is not run again. Tuned candidates come from
these records.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from nemo_disco.runtime.errors import DivergedError

from . import grid as grids
from . import prepare, processes, results_file
from . import record as run_records
from .candidates import Candidate
from .grid import PlannedRun
from .results_file import Record

POLL_S = 0.5  # seconds between two looks at the processes and the pause file


class RunQueue:
    """The runs of a grid that have no record in a results file yet; `run` runs all of them."""

    def __init__(self, work: Path, grid: Mapping[str, Any], results: Path, pause: Path, jobs: int) -> None:
        """pause: while this file exists, no run starts and running ones are stopped. jobs: the most runs at once."""
        self.work, self.grid, self.results, self.pause, self.jobs = work, grid, results, pause, jobs
        self.logs, self.runs = work / "logs", work / "runs"
        for directory in (self.logs, self.runs):
            directory.mkdir(parents=True, exist_ok=True)
        finished = {grids.name_record(r) for r in self._read_records()}
        self.waiting = [run for run in grids.list_runs(grid) if run.name not in finished]
        self.running: list[processes.RunProcess] = []
        self.failed: list[str] = []

    def run(self) -> None:
        """Run all waiting runs. If this ends early, for example by a signal, the running ones are killed.

        Raises RuntimeError if runs failed, or cannot start since the tuning of their method failed.
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
        """Start the first waiting run whose candidate is known. Returns False if there is none."""
        records = self._read_records()
        for run in self.waiting:
            candidate = self._choose_candidate(run, records)
            if candidate is not None:
                self.waiting.remove(run)
                weights = {r["start"] for r in records if "start" in r and r["seed"] == run.seed}
                job = partial(execute_run, run, self.grid, candidate, self.work, self.results, weights)
                self.running.append(processes.fork_run(run.name, job, self.logs / f"{run.name}.log"))
                return True
        return False

    def _read_records(self) -> list[Record]:
        return results_file.read_records(self.results, grids.name_record)

    def _choose_candidate(self, run: PlannedRun, records: Sequence[Record]) -> Candidate | None:
        if run.part == grids.BASE:
            return Candidate(0.0)
        candidates = grids.list_method_candidates(self.grid, run.tuned_method)
        return run.candidate or grids.choose_candidate(run.tuned_method, records, candidates)

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


def execute_run(
    run: PlannedRun,
    grid: Mapping[str, Any],
    candidate: Candidate,
    work: Path,
    results: Path,
    weights: Collection[str],
) -> None:
    """Train and evaluate in a directory of WORK/runs, append the record to `results`, and remove the directory.

    weights: the digests of the starts in the records of the same seed. Raises RuntimeError if the start has another.
    """
    setup, directory = prepare.Setup.from_grid(grid), work / "runs" / run.name
    start = prepare.prepare_start(work, setup, setup.start_seed(run.seed))
    digest = prepare.identify_start(start)
    if weights and digest not in weights:
        raise RuntimeError(
            f"{start} has other weights than the start of the finished runs of seed {run.seed}, as happens on another "
            f"machine; remove the records of this seed from {results}, and they are repeated"
        )
    shutil.rmtree(directory, ignore_errors=True)
    began = time.monotonic(), time.process_time()
    record: Record = {"part": run.part, "method": run.method, "of": run.tuned_method, "seed": run.seed}
    record |= {"learning_rate": candidate.learning_rate, "beta": candidate.beta, "start": digest}
    record |= _train_and_evaluate(run, run.arguments(work, start, candidate), directory)
    wall, processor = (now - then for now, then in zip((time.monotonic(), time.process_time()), began, strict=True))
    record |= {"seconds": round(wall, 1), "processor_seconds": round(processor, 1)}
    results_file.append_record(results, record | {"version": results_file.read_commit()})
    shutil.rmtree(directory)


def _train_and_evaluate(run: PlannedRun, arguments: list[str], directory: Path) -> dict[str, Any]:
    """Run `nemo-disco train` and `nemo-disco evaluate` in this process, and return the record's results.

    They are `curve` and `evaluation`; instead of the latter there is `failed`, the reason, if the policy diverged. A
    run of BASE is not trained and has no curve. Raises RuntimeError if a command failed for another reason.
    """
    from nemo_disco import cli

    results: dict[str, Any] = {}
    if run.part != grids.BASE:
        code = cli.main(["train", *arguments, f"exp_manager.explicit_log_dir={directory}"])
        if code not in (0, DivergedError.exit_code):
            raise RuntimeError(f"the training of {run.name} failed; the lines above say why")
        results["curve"] = run_records.read_curves(directory)
        if code:  # a policy that diverged is a result; its curve ends there
            return results | {"failed": "the policy diverged"}
        arguments = [*arguments, f"model.path={directory / 'export'}"]
    if cli.main(["evaluate", *arguments, f"exp_manager.explicit_log_dir={directory / 'after'}"]):
        raise RuntimeError(f"the evaluation of {run.name} failed; the lines above say why")
    return results | {"evaluation": run_records.read_evaluation(directory / "after" / "evaluation")}


def run_grid(work: Path, grid: Mapping[str, Any], results: Path, pause: Path, jobs: int) -> None:
    """Prepare the questions if that is not done yet, and run all runs of the grid that have no record in `results`."""
    work.mkdir(parents=True, exist_ok=True)
    prepare.prepare_questions(work, prepare.Setup.from_grid(grid))
    RunQueue(work, grid, results, pause, jobs).run()
