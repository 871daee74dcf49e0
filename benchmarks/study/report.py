"""The report of grid.yaml: a Markdown page and its figures, made from the records of the finished runs alone.

It shows all results, whichever way they went, and counts the planned runs that are missing.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from . import claims, plots, tables
from . import grid as grids
from .runs import FinishedRuns, read_runs
from .statistics import collect_shares, estimate_mean

RESULTS = grids.HERE.parent / "results" / "study"
COMMAND = "python -m benchmarks.study run WORK && python -m benchmarks.study report --gather WORK"


def write_report(out: Path = RESULTS) -> Path:
    """Write report.md and its figures in the directory `out` from its runs.jsonl, and return the path of report.md."""
    runs = read_runs(out / "runs.jsonl", grids.load_grid())
    sections = [
        _report_overview(runs),
        _report_tuning(runs),
        _report_main(runs, out),
        _report_claims(runs, out),
        _report_ablations(runs, out),
        _report_lengths(runs, out),
    ]
    path = out / "report.md"
    path.write_text("\n".join(s for s in sections if s))
    return path


# --- the sections: each returns its Markdown, "" if it has no runs, and writes its figures in `out` ---


def _report_overview(runs: FinishedRuns) -> str:
    seconds = [r["processor_seconds"] for r in runs.records if r["part"] != grids.BASE]
    commits = ", ".join(sorted({r["version"] for r in runs.records}))
    warm_start = _describe_warm_start(runs)
    return f"""# The papers in miniature

A policy of 0.1M parameters, warm-started on worked sums, is trained by each method on the same questions with the same
number of rollouts: see [benchmarks/study](../../study/README.md) for the task, the sizes and the simplifications. All
runs used the processor cores of a shared machine and no GPU. What holds here need not hold for models of billions of
parameters, and the other way round.

    {COMMAND}

{len(runs.records)} runs, a median of {np.median(seconds):.0f} processor seconds each (commits of the code: {commits}).
Intervals are 95% bootstrap intervals over seeds and questions together; with few seeds they are too narrow, and with
one seed they are over questions alone. `python -m benchmarks.study report` makes this page from `runs.jsonl` again.

{tables.tabulate_parts(runs)}
{_describe_missing_runs(runs)}
At the start of training, {warm_start}
"""


def _describe_missing_runs(runs: FinishedRuns) -> str:
    """A sentence on the planned runs that are not finished."""
    parts = (grids.TUNING, grids.MAIN, grids.ABLATIONS, grids.LENGTH)
    missing = [p for p in parts if runs.count_finished(p) < runs.count_planned(p)]
    if not missing:
        return "Nothing was cut: all planned runs are finished.\n"
    seeds = {p: len({r["seed"] for r in runs.records if r["part"] == p}) for p in missing}
    counts = (
        f"{p}: {runs.count_finished(p)} of {runs.count_planned(p)} runs, from {seeds[p]} seed(s)" for p in missing
    )
    return f"**Cut for time**: {'; '.join(counts)}. The tables say how many seeds each figure has.\n"


def _describe_warm_start(runs: FinishedRuns) -> str:
    """A sentence on the accuracy of the policy that training starts from.

    It is measured by the rollouts of the runs' first step, which that policy samples, and by the evaluation of BASE.
    """
    first = {
        n: np.mean([r["curve"][n][0] for r in runs.records if "curve" in r])
        for n in ("all_wrong", "all_right", "reward")
    }
    base = [r for r in runs.records if r["part"] == grids.BASE]
    held_out = f"; held-out avg@16 {tables.format_estimate(estimate_mean(collect_shares(base)))}" if base else ""
    return (
        f"{first['reward']:.1%} of the responses are right; {first['all_wrong']:.0%} of the questions have no right "
        f"response among 8, and {first['all_right']:.0%} have only right ones{held_out}."
    )


def _report_tuning(runs: FinishedRuns) -> str:
    return f"""## Learning rates

All methods are tuned on the same small grid of learning rates, at a seed that no later training has. The table has
Pass@1 on questions that are used for nothing else; the learning rate in bold is used from here on.

{tables.tabulate_tuning(runs)}"""


def _report_main(runs: FinishedRuns, out: Path) -> str:
    if not runs.count_finished(grids.MAIN):
        return ""
    delta = read_delta(runs)
    plots.plot_curves(runs, out / "curves.png")
    plots.plot_kl(runs, delta, out / "kl.png")
    return f"""## The methods at equal rollouts

Reward, entropy, the shares of questions with no and with only right responses, and length are means over the last
{tables.LAST} steps of training.

{tables.tabulate_main(runs)}
![curves](curves.png)

KL_hat of each step's last mini-batch and its standard error; the dotted line is delta = {delta:g}.
{_describe_kl_noise(runs)}

![KL](kl.png)
"""


def _report_claims(runs: FinishedRuns, out: Path) -> str:
    if not runs.count_finished(grids.MAIN):
        return ""
    comparisons = claims.compare_with_baselines(runs)
    plots.plot_differences(comparisons, "held-out avg@16, minus the baseline's", out / "wins.png")
    above = sum(e.low > 0 for _, e in comparisons)
    below = sum(e.high < 0 for _, e in comparisons)
    return f"""## What the papers claim

"Holds" means that the whole interval is above 0, "the opposite" that it is below 0. With one seed nothing is decided.

{claims.tabulate_claims(runs)}
Of {len(comparisons)} comparisons of DisCO's methods with the baselines, {above} have their whole interval above 0, and
{below} have it below 0. The intervals are not corrected for the number of comparisons.

![differences](wins.png)
"""


def _report_ablations(runs: FinishedRuns, out: Path) -> str:
    if not (rows := tables.compare_ablations(runs)):
        return ""
    plots.plot_differences(
        [(label, e) for label, _, e in rows], "held-out avg@16, minus unchanged", out / "ablations.png"
    )
    return f"""## Ablations

{tables.tabulate_ablations(runs)}
![ablations](ablations.png)
"""


def _report_lengths(runs: FinishedRuns, out: Path) -> str:
    if not runs.count_finished(grids.LENGTH):
        return ""
    plots.plot_lengths(tables.collect_length_points(runs), out / "lengths.png")
    return f"""## Accuracy against length

AES, the accuracy-efficiency score, compares a method with the same method without its length penalty, which the last
column names.

{tables.tabulate_lengths(runs)}
![lengths](lengths.png)
"""


def read_delta(runs: FinishedRuns) -> float:
    """The constraint's bound delta in the grid, which is the same for all of DisCO's methods."""
    match = re.search(r"delta=([^ ]+)", " ".join(runs.grid["methods"]["disco_logl"]["overrides"]))
    assert match is not None
    return float(match[1])


def _describe_kl_noise(runs: FinishedRuns) -> str:
    """A sentence on the standard error of KL_hat in the steps of DisCO's runs, compared with delta."""
    errors = [
        e for r in runs.records if r["method"].startswith("disco") for e in r.get("curve", {}).get("kl_stderr", ())
    ]
    if not errors:
        return ""
    low, middle, high = np.percentile(errors, [10, 50, 90])
    delta = read_delta(runs)
    return (
        f"The standard error of KL_hat in the steps of DisCO's runs has the median {middle:.1e} and the 10% and 90% "
        f"quantiles {low:.1e} and {high:.1e}. So delta is {delta / middle:.1f} standard errors above 0 in the median, "
        f"and {delta / high:.1f} at the 90% quantile."
    )
