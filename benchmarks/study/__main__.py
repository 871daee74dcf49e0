"""python -m benchmarks.study run WORK | report: the papers' comparisons in miniature. See README.md."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

from . import grid as grids


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run what is not yet in WORK/results")
    run.add_argument("work", type=Path)
    run.add_argument("--grid", type=Path, default=grids.GRID, help="default: the study's")
    run.add_argument("--pause", type=Path, help="stop while this file is there (default WORK/pause)")
    run.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at once (default: a run a core)")
    report = commands.add_parser("report", help="tables and figures from the finished runs")
    report.add_argument(
        "--gather", type=Path, metavar="WORK", help="take the finished runs of this work directory first"
    )
    report.add_argument("--out", type=Path, help="default: benchmarks/results/study")
    options = parser.parse_args()
    if options.command == "report":
        from . import report as reports

        print(reports.write(options.out or reports.RESULTS, options.gather))
        return
    from . import work_queue

    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM; what runs is run again at the next start"))
    work = options.work.resolve()
    work_queue.start(work, grids.load(options.grid), options.pause or work / "pause", options.jobs)


if __name__ == "__main__":
    main()
