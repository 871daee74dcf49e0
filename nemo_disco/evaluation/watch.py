"""`nemo-disco report --watch`: the page, written anew whenever a run wrote something. Reads run directories only."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from nemo_disco.evaluation.report import write_report
from nemo_disco.runtime.rundir import RunDirectory

EVERY_S = 5.0
RELOAD_S = 15


def watch(runs: list[Path], out: Path | None, every_s: float = EVERY_S) -> int:
    """Until KeyboardInterrupt, which is a tidy end: then the page no longer loads itself anew. Returns 0.

    Raises UserError as write_report does.
    """
    seen: object = None
    try:
        while True:
            now = [state(run) for run in runs]
            if now != seen:
                path = write_report(runs, out, reload_s=RELOAD_S)
                print(f"{time.strftime('%H:%M:%S')} {path}", flush=True)
                seen = now
            time.sleep(every_s)
    except KeyboardInterrupt:
        print(write_report(runs, out))
        return 0


def state(path: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of what the page is made of."""
    run = RunDirectory(path)
    files = [run.metrics, run.config, *sorted(run.evaluation.glob("*.json")), *sorted(run.rollouts.glob("*.jsonl"))]
    found = []
    for file in files:
        with contextlib.suppress(FileNotFoundError):  # the run removes some of its files
            stat = file.stat()
            found.append((file.name, stat.st_size, stat.st_mtime_ns))
    return found
