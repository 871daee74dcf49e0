"""The command line of the fact-chain arm: `python -m benchmarks.study.fact_chain run` and `... report`.

Trains small dense policies with nemo_disco's objectives under each constraint, in one process on one core. `run` may be
stopped at any moment and started again: it goes on after the last record of the results file.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from .. import results_file
from . import report, runs

RESULTS = Path(__file__).parents[2] / "results" / "study_trust_region" / "fact_chain" / "runs.jsonl"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study.fact_chain", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, words in {
        "run": "execute the runs of the grid that have no record",
        "report": "write report.md beside the records",
    }.items():
        command = commands.add_parser(name, help=words)
        command.add_argument("--grid", type=Path, default=runs.GRID, help="default: grid.yaml of the arm")
        command.add_argument("--results", type=Path, default=RESULTS, help="the file of records, one a line")
    options = parser.parse_args(arguments)
    grid, records = runs.load_grid(options.grid), results_file.read_records(options.results)
    if options.command == "report":
        print(report.write_report(options.results.with_name("report.md"), grid, records))
        return
    planned = len(runs.list_runs(grid))
    for record in runs.run_all(grid, records):
        results_file.append_record(options.results, record)
        accuracy = np.mean(record["correct"]) / record["samples"]
        seconds = record["processor_seconds"]
        print(f"{len(records)} of {planned}: {record['name']} {accuracy:.3f} in {seconds} s", flush=True)


if __name__ == "__main__":
    main()
