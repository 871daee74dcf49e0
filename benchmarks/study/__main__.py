"""The command line of the study: `python -m benchmarks.study run WORK` and `python -m benchmarks.study report`.

The study repeats the papers' comparisons in miniature; README.md describes it.
"""

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
    run = commands.add_parser("run", help="run all runs of the grid that have no result in WORK/results")
    run.add_argument("work", type=Path, help="the study's work directory, made if it is missing")
    run.add_argument("--grid", type=Path, default=grids.GRID, help="default: grid.yaml of the study")
    run.add_argument("--pause", type=Path, help="pause all runs while this file exists (default WORK/pause)")
    run.add_argument("--jobs", type=int, default=os.cpu_count(), help="number of runs at once (default: one per core)")
    report = commands.add_parser("report", help="write tables and figures of the finished runs")
    report.add_argument(
        "--gather", type=Path, metavar="WORK", help="first write the finished runs of this work directory to runs.jsonl"
    )
    report.add_argument("--out", type=Path, help="directory of the report (default: benchmarks/results/study)")
    options = parser.parse_args()
    if options.command == "report":
        from . import report as reports

        print(reports.write_report(options.out or reports.RESULTS, options.gather))
        return
    from . import work_queue

    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM; the next start repeats unfinished runs"))
    work = options.work.resolve()
    work_queue.run_study(work, grids.load_grid(options.grid), options.pause or work / "pause", options.jobs)


if __name__ == "__main__":
    main()
