"""The command line of the study: `python -m benchmarks.study run WORK` and `python -m benchmarks.study report`.

The study repeats the papers' comparisons in miniature, and then tests hypotheses of its own about the constraint;
README.md describes both.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
from pathlib import Path

from . import grid as grids

RECORDS = "runs.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help=f"run all runs of the grid that have no record in OUT/{RECORDS}")
    run.add_argument("work", type=Path, help="the grid's work directory, made if it is missing")
    run.add_argument("--out", type=Path, help="directory of the records (default WORK)")
    run.add_argument("--pause", type=Path, help="pause all runs while this file exists (default WORK/pause)")
    run.add_argument("--jobs", type=int, default=os.cpu_count(), help="number of runs at once (default: one per core)")
    report = commands.add_parser("report", help="write tables and figures of the finished runs")
    report.add_argument("--gather", type=Path, metavar="WORK", help=f"first replace OUT/{RECORDS} by the one of WORK")
    report.add_argument("--out", type=Path, help="directory of the report (default: the grid's in benchmarks/results)")
    for command in (run, report):
        command.add_argument("--grid", type=Path, default=grids.GRID, help="default: grid.yaml of the study")
    options = parser.parse_args()
    grid = grids.load_grid(options.grid)
    if options.command == "report":
        write_report(grid, options.out or grids.RESULTS / grid["results"], options.gather)
        return
    from . import work_queue

    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM; the next start repeats unfinished runs"))
    work = options.work.resolve()
    records = (options.out or work).resolve() / RECORDS
    work_queue.run_grid(work, grid, records, options.pause or work / "pause", options.jobs)


def write_report(grid: grids.Grid, out: Path, work: Path | None = None) -> None:
    """Write the grid's report in the directory `out` from its records, which are first copied from `work` if given."""
    if work is not None:
        out.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(work / RECORDS, out / RECORDS)
    if "title" in grid:
        from . import hypotheses_report

        print(hypotheses_report.write_report(grid, out))
    else:
        from . import report

        print(report.write_report(out))


if __name__ == "__main__":
    main()
