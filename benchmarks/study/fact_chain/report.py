"""The report of the fact-chain arm: a Markdown page, made from the records alone.

It shows all cells, whichever way they went, counts the missing runs, and ends with what the arm does not say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..comparisons import Family, report_families
from ..results_file import Record
from ..statistics import Shares, estimate_mean
from ..tables import format_estimate, format_table
from .runs import (
    MAIN,
    Grid,
    check_records,
    choose_candidate,
    list_cells,
    list_runs,
    score_candidates,
)

Cell = tuple[str, str]
LAST = 2  # points of a curve over which the end of training is averaged
DISCO = ("disco_logl", "disco_lratio")

LIMITS = """## What this does not say

- **Nothing about language models of any size.** The policy is a table of 640 next-symbol distributions behind a small
  network; a response has 3 to 6 tokens, its length is given, and facts are independent of each other.
- **Nothing about the papers' figures.** Their tasks, sizes, budgets and delta differ. k1 is their estimator, at
  hundreds of thousands of tokens a mini-batch; here a mini-batch has about 290 tokens, where k1 is almost only noise.
- **Nothing about other settings**: one delta, one number of updates per step, one group size; four candidates a cell in
  the tuning. A method that needs another rate or beta than these is undersold.
- A cell without a constraint has more rates to choose from and no beta, so that both have the same number of runs; the
  candidates themselves cannot be the same.
- Intervals over ten starts are somewhat narrow. The starts vary by their facts and random weights alone.
- "Not decided" is not "equal".
"""


def write_report(path: Path, grid: Grid, records: Sequence[Record]) -> Path:
    """Write the page to `path`, which is returned. Raises OtherSettingsError for records that do not fit the grid."""
    check_records(grid, records)
    sections = (_report_overview(grid, records), _report_tuning(grid, records), _report_cells(grid, records))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join((*sections, _report_comparisons(grid, records), _report_starts(grid, records), LIMITS)))
    return path


def _report_overview(grid: Grid, records: Sequence[Record]) -> str:
    planned, finished = len(list_runs(grid)), len(records)
    missing = "Nothing was cut."
    if planned != finished:
        missing = f"**{planned - finished} planned runs are missing**; the tables have the starts that are complete."
    starts = {r["start"]: r["start_accuracy"] for r in records if r["part"] == MAIN}
    seconds = [r["processor_seconds"] for r in records] or [0.0]
    commits = ", ".join(sorted({r["version"] for r in records}))
    accuracies = ", ".join(f"{100 * starts[s]:.1f}%" for s in sorted(starts))
    return f"""# Fact chains: objectives and constraints

Small dense policies, trained by nemo_disco's objectives with each constraint; the hypotheses were fixed before
([hypotheses.md](../../../study/hypotheses.md)), the settings are [grid.yaml](../../../study/fact_chain/grid.yaml).

    python -m benchmarks.study.fact_chain run && python -m benchmarks.study.fact_chain report

{finished} of {planned} runs, a median of {np.median(seconds):.1f} processor seconds each and {sum(seconds) / 60:.0f}
minutes together (commits of the code: {commits}). {missing} {_describe_diverged(records)}
avg@{grid["evaluation_samples"]} of the starts on the test questions: {accuracies}.
"""


def _describe_diverged(records: Sequence[Record]) -> str:
    diverged = [r["name"] for r in records if r["diverged"] is not None]
    return "No run diverged." if not diverged else f"Diverged, and counted as 0: {', '.join(diverged)}."


def _report_tuning(grid: Grid, records: Sequence[Record]) -> str:
    rows = []
    for cell in list_cells(grid):
        chosen = choose_candidate(grid, cell, records)
        scores = [
            ("{}" if candidate != chosen else "**{}**").format("" if score is None else f"{candidate}: {score:.3f}")
            for candidate, score in score_candidates(grid, cell, records).items()
        ]
        rows.append((_label(grid, cell), *scores))
    columns = [f"candidate {i + 1}" for i in range(max(len(row) for row in rows) - 1)]
    return f"""## Tuning

avg@{grid["evaluation_samples"]} on the development questions, as a mean over the starts that are for this alone (their
number: {len(grid["tuning"]["starts"])}); the candidate in bold is used from here on.

{format_table(("cell", *columns), rows)}"""


def _report_cells(grid: Grid, records: Sequence[Record]) -> str:
    rows = []
    for cell, runs in _main_runs(grid, records).items():
        if not runs:
            continue
        solved = {start: (shares > 0).astype(float) for start, shares in _shares(runs).items()}
        rows.append(
            (
                *(_label(grid, cell), f"{runs[0]['learning_rate']:g}"),
                "" if runs[0]["beta"] is None else f"{runs[0]['beta']:g}",
                str(len(runs)),
                format_estimate(estimate_mean(_shares(runs))),
                f"{estimate_mean(solved).value:.3f}",
                f"{np.mean([r['never_solved'] for r in runs]):.3f}",
                *(_format_end(runs, name) for name in ("all_wrong", "entropy")),
                *(_format_mean(runs, name) for name in ("kl_after", "active")),
            )
        )
    head = ("cell", "lr", "beta", "starts", "avg@16", "pass@16", "never solved", "0% right", "entropy", "KL after")
    return f"""## Cells

avg@16, with its 95% bootstrap interval over starts and questions, and pass@16 are of the test questions. "Never solved"
is the share of the training questions without a right response in the whole training; "0% right", the share of a step's
groups without a right response, and the entropy in nats are of the last tenth of the training. "KL after" is the exact
KL(old || policy) per token after a step's last update, and "active" the share of updates with a penalty, both as means
over all steps. The last four leave out the runs that diverged.

{format_table((*head, "active"), rows)}"""


def _report_comparisons(grid: Grid, records: Sequence[Record]) -> str:
    values = {cell: _shares(runs) for cell, runs in _main_runs(grid, records).items()}
    return report_families(values, list_families(grid))


def _report_starts(grid: Grid, records: Sequence[Record]) -> str:
    runs, starts = _main_runs(grid, records), grid["main"]["starts"]
    rows = []
    for cell, of_cell in runs.items():
        accuracies = {start: float(shares.mean()) for start, shares in _shares(of_cell).items()}
        rows.append((_label(grid, cell), *(f"{accuracies[s]:.2f}" if s in accuracies else "" for s in starts)))
    return f"""## Every start

avg@16 by start.

{format_table(("cell", *map(str, starts)), rows)}"""


def list_families(grid: Grid) -> list[Family[Cell]]:
    """The comparisons by hypothesis; those of the last family are only described."""
    objectives = list(grid["objectives"])

    def compare_constraints(*kinds: tuple[str, str]) -> list[tuple[str, Cell, Cell]]:
        return [_pair(grid, (o, a), (o, b)) for a, b in kinds for o in objectives]

    def compare_with_grpo(names: Sequence[str], *constraints: str) -> list[tuple[str, Cell, Cell]]:
        return [_pair(grid, (o, c), ("grpo", c)) for c in constraints for o in names]

    described = compare_constraints(("k1", "none"), ("top_4", "none"), ("exact", "none"), ("top_4", "exact"))
    described += compare_with_grpo(["grpo_rw"], "none", "k3", "exact")
    return [
        Family("1. A constraint that acts helps each objective", compare_constraints(("k3", "none"))),
        Family("2. Under the same constraint DisCO is above GRPO", compare_with_grpo(DISCO, "k3")),
        Family("3. The estimator matters: k3 is above k1", compare_constraints(("k3", "k1"))),
        Family(
            '3. Top 4 and exact are not worse than k3 ("the opposite" would refute it)',
            compare_constraints(("top_4", "k3"), ("exact", "k3")),
        ),
        Family("", described + compare_with_grpo(DISCO, "none", "exact", "top_4", "k1")),
    ]


def _pair(grid: Grid, first: Cell, second: Cell) -> tuple[str, Cell, Cell]:
    return f"{_label(grid, first)} - {_label(grid, second)}", first, second


def _label(grid: Grid, cell: Cell) -> str:
    return f"{grid['objectives'][cell[0]]['label']}, {grid['constraints'][cell[1]]['label']}"


def _main_runs(grid: Grid, records: Sequence[Record]) -> Mapping[Cell, list[Record]]:
    """The records of the main runs of each cell, at the starts that have a record of every cell."""
    main, cells = [r for r in records if r["part"] == MAIN], len(list_cells(grid))
    complete = {start for start in grid["main"]["starts"] if sum(r["start"] == start for r in main) == cells}
    main = [r for r in main if r["start"] in complete]
    return {cell: [r for r in main if (r["objective"], r["constraint"]) == cell] for cell in list_cells(grid)}


def _shares(runs: Sequence[Record]) -> Shares:
    """Start -> the share of right samples of each test question."""
    return {r["start"]: np.array(r["correct"]) / r["samples"] for r in runs}


def _format_end(runs: Sequence[Record], name: str) -> str:
    values = [np.mean(r["curve"][name][-LAST:]) for r in runs if r["diverged"] is None]
    return f"{np.mean(values):.3f}" if values else ""


def _format_mean(runs: Sequence[Record], name: str) -> str:
    values = [np.mean(r["curve"][name]) for r in runs if r["diverged"] is None]
    return f"{np.mean(values):.2g}" if values else ""
