"""The report of a grid with a title: tuning, methods, comparisons of the hypotheses, accuracy against length.

A Markdown page, made from the records alone. It shows all results, whichever way they went, counts the planned runs
that are missing, and ends with what it does not say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from nemo_disco.evaluation.statistics import accuracy_efficiency_score

from . import grid as grids
from .comparisons import Family, report_families
from .results_file import Record
from .runs import FinishedRuns, read_runs
from .statistics import Shares, collect_shares, estimate_difference, estimate_mean
from .tables import WITHOUT_PENALTY, format_difference, format_estimate, format_table

LAST = 10  # steps at the end of training, over which figures are averaged
FEW = 6  # starts, below which a bootstrap over them is much too narrow: no sign-flip test of them is below .05

LIMITS = """## What this does not say

- **Nothing about models of billions of parameters**, nor about the papers' figures. The policy has 0.1M parameters, the
  task is sums of a few one-digit numbers, and a mini-batch has a few thousand tokens.
- **Nothing about other settings**: one delta, one estimator, four updates a step, groups of 8, and few candidates in
  the tuning, at one start. A method that needs another rate or beta than these is undersold.
- All starts are asked the same training and test questions; they differ by random weights and by the supervised data.
- Intervals over so few starts are somewhat narrow. "Not decided" is not "equal".
"""
UNEQUAL = """- A method without a constraint has more rates to choose from and no beta, so that all methods have as many
  tuning runs; the candidates themselves cannot be the same.
"""
INHERITED = """- The length methods were not tuned: they take the rate of GRPO or of DisCO.
- Four settings had been seen on the test questions, at another start, when the number of steps and ALP's strengths were
  chosen (hypotheses.md).
"""


def write_report(grid: grids.Grid, out: Path) -> Path:
    """Write report.md in the directory `out` from its runs.jsonl, and return its path."""
    runs = read_runs(out / "runs.jsonl", grid)
    sections = [_report_overview(runs), _report_tuning(runs)]
    runs = select_complete_starts(runs)
    sections.append(_report_methods(runs))
    if "comparisons" in grid:
        sections.append(_report_comparisons(runs))
    if grids.LENGTH in grid:
        sections.append(_report_lengths(runs))
    path = out / "report.md"
    limits = LIMITS + ("comparisons" in grid) * UNEQUAL + (grids.LENGTH in grid) * INHERITED
    path.write_text("\n".join([*sections, limits]))
    return path


def select_complete_starts(runs: FinishedRuns) -> FinishedRuns:
    """The runs without those of a part at a start that lacks one of the part's planned runs."""
    incomplete = {place for place, finished in _list_finished(runs).items() if not all(finished)}
    return FinishedRuns([r for r in runs.records if (r["part"], r["seed"]) not in incomplete], runs.grid)


def _list_finished(runs: FinishedRuns) -> dict[tuple[str, int], list[bool]]:
    """(part, seed of the start) -> whether each of its planned runs is finished."""
    names = {grids.name_record(r) for r in runs.records}
    finished: dict[tuple[str, int], list[bool]] = {}
    for run in grids.list_runs(runs.grid):
        finished.setdefault((run.part, run.seed), []).append(run.name in names)
    return finished


def _report_overview(runs: FinishedRuns) -> str:
    finished = _list_finished(runs)
    every = [run for of_start in finished.values() for run in of_start]
    cut = "Nothing was cut."
    if missing := every.count(False):
        cut = f"**{missing} of the {len(every)} planned runs are missing**: {_describe_cut(finished)}."
    seconds = [r["processor_seconds"] for r in runs.records if r["part"] != grids.BASE] or [0.0]
    commits = ", ".join(sorted({r["version"] for r in runs.records}))
    failed = [grids.name_record(r) for r in runs.records if "failed" in r]
    failures = (
        f"The policy diverged, which counts as accuracy 0: {', '.join(failed)}." if failed else "No run diverged."
    )
    starts = ", ".join(f"{grids.pass_at_1(r):.1%} ({r['seed']})" for r in runs.select(grids.BASE, "warm_start"))
    return f"""# {runs.grid["title"]}

The hypotheses, the measures and the sizes were fixed before the runs
([hypotheses.md](../../../study/hypotheses.md)); [benchmarks/study](../../../study/README.md) has the commands.

{len(runs.records)} runs with a median of {np.median(seconds):.0f} processor seconds, {sum(seconds) / 3600:.1f} hours
together (commits of the code: {commits}). {cut} {failures}
avg@16 of the starts (in brackets their seeds, of which {runs.grid["tuning"]["seed"]} is for tuning alone): {starts}.
"""


def _describe_cut(finished: Mapping[tuple[str, int], Sequence[bool]]) -> str:
    """How many starts of each part are complete, and which ones are left out of the tables although they have runs.
    finished: of _list_finished."""
    parts = []
    for part in (grids.TUNING, grids.MAIN, grids.LENGTH):
        starts = {seed: runs for (of_part, seed), runs in finished.items() if of_part == part}
        complete = sum(map(all, starts.values()))
        if complete < len(starts):
            left = [f"{seed} ({sum(r)} of {len(r)} runs)" for seed, r in starts.items() if any(r) and not all(r)]
            text = f"{part}: {complete} of {len(starts)} starts are complete"
            parts.append(text + (f", and left out is the start of seed {', '.join(left)}" if left else ""))
    return "; ".join(parts)


def _report_tuning(runs: FinishedRuns) -> str:
    rows = []
    for method, label in runs.method_labels().items():
        candidates = grids.list_method_candidates(runs.grid, method)
        best = grids.choose_candidate(method, runs.records, candidates)
        scores = grids.score_candidates(method, runs.records)
        texts = [f"{c}: {scores[c]:.3f}" if c in scores else "" for c in candidates]
        rows.append((label, *(f"**{t}**" if c == best else t for c, t in zip(candidates, texts, strict=True))))
    columns = [f"candidate {i + 1}" for i in range(max(len(row) for row in rows) - 1)]
    return f"""## Tuning

avg@16 on the development questions, at a start that is for this alone; the candidate in bold is used from here on.

{format_table(("method", *columns), rows)}"""


def _report_methods(runs: FinishedRuns) -> str:
    rows = []
    for label, records in _records_by_label(runs).items():
        if not records:
            continue
        shares = _collect_shares(records)
        solved = {seed: (values > 0).astype(float) for seed, values in shares.items()}
        beta = records[0]["beta"]
        rows.append(
            (
                *(label, f"{records[0]['learning_rate']:g}", "" if beta is None else f"{beta:g}", str(len(records))),
                *(format_estimate(estimate_mean(shares)), format_estimate(estimate_mean(solved))),
                _format_end(records, "never_solved", last=1),
                *(_format_end(records, name) for name in ("all_wrong", "entropy", "length")),
                *(_format_mean(records, name) for name in ("kl_after", "active")),
            )
        )
    head = ("method", "lr", "beta", "starts", "avg@16", "pass@16", "never solved", "0% right", "entropy", "length")
    return f"""## Methods

avg@16 and pass@16 are of the test questions, with 95% bootstrap intervals over starts and questions (over questions
alone where there is one start). "Never solved" is the share of the training questions asked that never had a right
response, at the end of training; "0% right", the share of a step's groups without a right response, the entropy in nats
and the length in tokens are means of the last {LAST} steps. "KL after" is KL(old || policy) per token after a step's
last update (k3), and "active" the share of updates with a penalty, both as means over all steps. These columns leave
out the runs whose policy diverged.

{format_table((*head, "KL after", "active"), rows)}"""


def _report_comparisons(runs: FinishedRuns) -> str:
    values = {m: _collect_shares(runs.select(grids.MAIN, m)) for m in runs.grid["methods"]}
    labels, starts = runs.method_labels(), runs.grid[grids.MAIN]["seeds"]
    families = [
        Family(family.get("hypothesis", ""), [(f"{labels[a]} - {labels[b]}", a, b) for a, b in family["pairs"]])
        for family in runs.grid["comparisons"]
    ]
    means = {m: {start: f"{shares.mean():.2f}" for start, shares in values[m].items()} for m in labels}
    rows = [(label, *(means[m].get(start, "") for start in starts)) for m, label in labels.items()]
    few = ""
    if 1 < (count := len(runs.select(grids.MAIN, next(iter(labels))))) < FEW:
        few = f"\n**With {count} starts the intervals are too narrow, and p is {2 / 2**count:g} at least.**\n"
    return f"""{report_families(values, families)}{few}
## Every start

avg@16 by start.

{format_table(("method", *map(str, starts)), rows)}"""


def _report_lengths(runs: FinishedRuns) -> str:
    base = runs.select(grids.BASE, "warm_start")
    length = np.mean([np.mean(r["evaluation"]["length"]) for r in base]) if base else float("nan")
    return f"""## Accuracy against length

On the test questions; the starts' responses have {length:.1f} tokens. Differences are to the same method without its
length penalty, which the last column names, paired by start and question. A run whose policy diverged counts with
accuracy 0 and has no length. AES is the accuracy-efficiency score over the starts that both have. Described without a
decision: three strengths a method, and none of them was chosen on other questions.

{_tabulate_lengths(runs)}"""


def _tabulate_lengths(runs: FinishedRuns) -> str:
    methods, rows = _records_by_label(runs), []
    for label, records in sorted(methods.items()):
        if not records:
            continue
        accuracies, lengths = _collect_shares(records), _collect_lengths(records)
        against = WITHOUT_PENALTY.get(label.split()[0], "")
        others = methods.get(against, [])
        difference = estimate_difference(accuracies, _collect_shares(others))
        shorter = estimate_difference(lengths, _collect_lengths(others))
        cells = [format_difference(difference), format_difference(shorter), _score(records, others)]
        length = f"{_mean(lengths):.1f}" if lengths else ""
        accuracy = format_estimate(estimate_mean(accuracies))
        rows.append((label, str(len(accuracies)), accuracy, cells[0], length, *cells[1:], against))
    head = ("method", "starts", "avg@16", "difference", "length", "difference, tokens", "AES", "against")
    return format_table(head, rows)


def _records_by_label(runs: FinishedRuns) -> dict[str, list[Record]]:
    """The records of every method and, in a grid with lengths, of every setting of a length method, by label."""
    records = {label: runs.select(grids.MAIN, method) for method, label in runs.method_labels().items()}
    for v in runs.grid.get(grids.LENGTH, {"variants": ()})["variants"]:
        records[v["label"]] = runs.select(grids.LENGTH, f"{v['of']}.{v['name']}")
    return records


def _score(records: Sequence[Record], others: Sequence[Record]) -> str:
    """The accuracy-efficiency score of a method against another, over the starts at which neither diverged."""
    both = {r["seed"] for r in records if "failed" not in r} & {r["seed"] for r in others if "failed" not in r}
    if not both:
        return ""
    (accuracy, length), reference = (
        (_mean(collect_shares(common)), _mean(_collect_lengths(common)))
        for common in ([r for r in some if r["seed"] in both] for some in (records, others))
    )
    return f"{accuracy_efficiency_score(length, accuracy, reference[::-1]):+.2f}"


def _collect_lengths(records: Sequence[Record]) -> Shares:
    """Seed -> the mean response length of each question, in tokens, without the runs whose training failed."""
    return {r["seed"]: np.array(r["evaluation"]["length"]) for r in records if "failed" not in r}


def _mean(values: Shares) -> float:
    return float(np.mean([v.mean() for v in values.values()]))


def _collect_shares(records: Sequence[Record]) -> Shares:
    """Seed -> the share of right samples of each question; 0 for each question if training failed."""
    questions = [len(r["evaluation"]["correct"]) for r in records if "failed" not in r]
    return {
        r["seed"]: np.zeros(max(questions, default=1))
        if "failed" in r
        else np.array(r["evaluation"]["correct"]) / r["evaluation"]["samples"]
        for r in records
    }


def _format_end(records: Sequence[Record], name: str, last: int = LAST) -> str:
    values = [np.nanmean(r["curve"][name][-last:]) for r in records if "failed" not in r]
    return f"{np.mean(values):.3g}" if values else ""


def _format_mean(records: Sequence[Record], name: str) -> str:
    values = [np.nanmean(r["curve"][name]) for r in records if "failed" not in r]
    return f"{np.mean(values):.2g}" if values else ""
