"""The queue of the study's runs: as many at once as there are cores, paused while a file is there, resumable.

A finished run is one JSON file in WORK/results; what is there is not run again. Learning rates come from those files.
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
from .grid import Item

POLL_S = 0.5


class Queue:
    """The items of a grid in a work directory; `run` them all."""

    def __init__(self, work: Path, grid: Mapping[str, Any], pause: Path, jobs: int) -> None:
        """pause: while this file is there nothing starts and what runs is stopped. jobs: runs at once."""
        self.work, self.grid, self.pause, self.jobs = work, grid, pause, jobs
        self.results, self.logs, self.runs = (work / name for name in ("results", "logs", "runs"))
        for directory in (self.results, self.logs, self.runs):
            directory.mkdir(parents=True, exist_ok=True)
        self.waiting = [item for item in grids.items(grid) if not self.result(item).exists()]
        self.running: list[processes.Process] = []
        self.failed: list[str] = []

    def result(self, item: Item) -> Path:
        return self.results / f"{item.name}.json"

    def run(self) -> None:
        """Until nothing is left that can run. Ended from outside, its runs end with it."""
        processes.import_everything()
        try:
            while self.waiting or self.running:
                self._reap()
                paused = self.pause.exists()
                for process in self.running:
                    process.pause(paused)
                    process.give_way()
                if not paused and len(self.running) < self.jobs and not self._start_next() and not self.running:
                    break
                time.sleep(POLL_S)
        finally:
            for process in self.running:
                process.kill()
        if self.failed or self.waiting:
            names = ", ".join([*self.failed, *(item.name for item in self.waiting)])
            raise RuntimeError(f"not finished, see {self.logs}: {names}")

    def _start_next(self) -> bool:
        """Start the first item whose learning rate is known; False if there is none."""
        tuned = self._tuned()
        self.waiting = [item for item in self.waiting if not self.result(item).exists()]  # copied here meanwhile
        for item in self.waiting:
            rate = self._best(item.of, tuned) if item.learning_rate is None else item.learning_rate
            if rate is not None:
                self.waiting.remove(item)
                job = partial(run_item, item, self.work, rate, self.result(item), self.runs / item.name)
                self.running.append(processes.fork(item.name, job, self.logs / f"{item.name}.log"))
                return True
        return False

    def _tuned(self) -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in self.results.glob(f"{grids.TUNING}.*.json")]

    def _best(self, method: str, tuned: Sequence[dict[str, Any]]) -> float | None:
        return grids.best_learning_rate(method, tuned, len(self.grid["tuning"]["learning_rates"]))

    def _reap(self) -> None:
        for process in [*self.running]:
            pid, status = os.waitpid(process.pid, os.WNOHANG)
            if not pid:
                continue
            self.running.remove(process)
            if code := os.waitstatus_to_exitcode(status):
                self.failed.append(process.name)
                print(f"{process.name} failed ({code})", file=sys.stderr, flush=True)
            else:
                print(f"{time.strftime('%H:%M:%S')} {process.name}; {len(self.waiting)} wait", flush=True)


def run_item(item: Item, work: Path, learning_rate: float, result: Path, run: Path) -> None:
    """Train and evaluate one item, write its record, and remove its run directory."""
    shutil.rmtree(run, ignore_errors=True)
    began = time.monotonic(), time.process_time()
    found: dict[str, Any] = {"part": item.part, "method": item.method, "of": item.of, "seed": item.seed}
    found |= {"learning_rate": learning_rate, **_outcome(item, item.arguments(work, learning_rate), run)}
    wall, processor = (now - then for now, then in zip((time.monotonic(), time.process_time()), began, strict=True))
    found |= {"seconds": round(wall, 1), "processor_seconds": round(processor, 1), "version": version()}
    temporary = result.with_suffix(".part")
    temporary.write_text(json.dumps(found))
    temporary.rename(result)
    shutil.rmtree(run)


def _outcome(item: Item, arguments: list[str], run: Path) -> dict[str, Any]:
    """Its curve, and what the held-out questions found or how it failed."""
    from nemo_disco import cli

    found: dict[str, Any] = {}
    if item.part != grids.BASE:
        code = cli.main(["train", *arguments, f"exp_manager.explicit_log_dir={run}"])
        found["curve"] = records.curve(run)
        if code:
            # A policy that diverged is a result; its curve ends there.
            return found | {"failed": f"training ended with code {code}"}
        arguments = [*arguments, f"model.path={run / 'export'}"]
    if cli.main(["evaluate", *arguments, f"exp_manager.explicit_log_dir={run / 'after'}"]):
        raise RuntimeError("the evaluation failed")
    return found | {"evaluation": records.evaluation(run / "after" / "evaluation")}


def version() -> str:
    command = ["git", "-C", str(grids.HERE), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def start(work: Path, grid: Mapping[str, Any], pause: Path, jobs: int) -> None:
    """Prepare the work directory where that is not done, evaluate what training starts from, and run the queue."""
    work.mkdir(parents=True, exist_ok=True)
    prepare.prepare(work)
    Queue(work, grid, pause, jobs).run()
