"""`nemo-disco report --watch`: rewrite the page whenever a run's files change."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from nemo_disco.evaluation.report import write_report
from nemo_disco.runtime.rundir import RunDirectory

POLL_S = 5.0
RELOAD_S = 15


def watch(runs: list[Path], out: Path | None, poll_s: float = POLL_S) -> int:
    """Rewrite the page until KeyboardInterrupt, then once more as a page that no longer reloads itself. Returns 0.

    Raises UserError as write_report does.
    """
    last_state: object = None
    try:
        while True:
            state = [file_states(run) for run in runs]
            if state != last_state:
                path = write_report(runs, out, reload_s=RELOAD_S)
                print(f"{time.strftime('%H:%M:%S')} {path}", flush=True)
                last_state = state
            time.sleep(poll_s)
    except KeyboardInterrupt:
        print(write_report(runs, out))
        return 0


def file_states(path: Path) -> list[tuple[str, int, int]]:
    """Name, size and modification time of each file of a run that the page shows."""
    run = RunDirectory(path)
    files = [run.metrics, run.config, *sorted(run.evaluation.glob("*.json")), *sorted(run.rollouts.glob("*.jsonl"))]
    states = []
    for file in files:
        with contextlib.suppress(FileNotFoundError):  # the run may remove a file at any time
            stat = file.stat()
            states.append((file.name, stat.st_size, stat.st_mtime_ns))
    return states
