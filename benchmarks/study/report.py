"""The report: Markdown and figures under a directory, from the finished runs alone.

Whatever came out is in it; what was cut is counted.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from . import claims, plots, tables
from . import grid as grids
from .runs import Runs, gather, read

RESULTS = grids.HERE.parent / "results" / "study"
COMMAND = "python -m benchmarks.study run WORK && python -m benchmarks.study report --gather WORK"


def write(out: Path = RESULTS, work: Path | None = None) -> Path:
    """out/report.md and its figures from out/runs.jsonl, which is gathered from `work` first if that is given."""
    if work is not None:
        gather(work, out / "runs.jsonl")
    runs = read(out / "runs.jsonl", grids.load())
    sections = [_opening(runs), _tuning(runs), _main(runs, out), _claims(runs, out), _ablations(runs, out)]
    sections.append(_lengths(runs, out))
    path = out / "report.md"
    path.write_text("\n".join(s for s in sections if s))
    return path


def _opening(runs: Runs) -> str:
    seconds = [r["processor_seconds"] for r in runs.records if r["part"] != grids.BASE]
    versions = sorted({r["version"] for r in runs.records})
    start = _start(runs)
    return f"""# The papers in miniature

A policy of 0.1M parameters, warm-started on worked sums, is trained by each method on the same questions with the same
number of rollouts: see [benchmarks/study](../../study/README.md) for the task, the sizes and what was simplified. No
GPU: processor cores of a shared machine. What holds here need not hold for models of billions of parameters, and the
reverse.

    {COMMAND}

{len(runs.records)} runs, a median of {np.median(seconds):.0f} processor seconds each; code of {", ".join(versions)}.
An interval is 95%, by bootstrap over seeds and questions together; of few seeds it is too narrow, and of one seed it is
over questions alone. `report` makes this page from `runs.jsonl` again.

{tables.parts(runs)}
{_cut(runs)}
At the start: {start}
"""


def _cut(runs: Runs) -> str:
    parts = (grids.TUNING, grids.MAIN, grids.ABLATIONS, grids.LENGTH)
    missing = [p for p in parts if runs.finished(p) < runs.planned(p)]
    if not missing:
        return "Nothing was cut.\n"
    seeds = {p: len({r["seed"] for r in runs.records if r["part"] == p}) for p in missing}
    words = (f"{p}: {runs.finished(p)} of {runs.planned(p)} runs, from {seeds[p]} seed(s)" for p in missing)
    return f"**Cut for time**: {'; '.join(words)}. Every figure says how many seeds it has.\n"


def _start(runs: Runs) -> str:
    """Of the first step's rollouts, which are the warm start's own, and of the warm start on the held-out questions."""
    first = {
        n: np.mean([r["curve"][n][0] for r in runs.records if "curve" in r])
        for n in ("all_wrong", "all_right", "reward")
    }
    base = [r for r in runs.records if r["part"] == grids.BASE]
    held_out = f"; held-out avg@16 {tables.shown(tables.estimate(tables.shares(base)))}" if base else ""
    return (
        f"{first['reward']:.1%} of the responses are right, {first['all_wrong']:.0%} of the questions have no right "
        f"response among 8 and {first['all_right']:.0%} only right ones{held_out}."
    )


def _tuning(runs: Runs) -> str:
    return f"""## Learning rates

One small grid for all, one seed of its own, Pass@1 on questions that are used for nothing else; bold is what is taken.

{tables.tuning(runs)}"""


def _main(runs: Runs, out: Path) -> str:
    if not runs.finished(grids.MAIN):
        return ""
    plots.curves(runs, out / "curves.png")
    plots.kl(runs, delta(runs), out / "kl.png")
    return f"""## The methods at equal rollouts

Reward, entropy, the shares of questions with no and with only right responses, and length are means over the last
{tables.LAST} steps of training.

{tables.main(runs)}
![curves](curves.png)

KL_hat of each step's last mini-batch and its standard error; dotted: delta = {delta(runs):g}. {_noise(runs)}

![KL](kl.png)
"""


def _claims(runs: Runs, out: Path) -> str:
    if not runs.finished(grids.MAIN):
        return ""
    wins = claims.wins(runs)
    plots.differences([(label, e) for label, e, _ in wins], "held-out avg@16, minus the baseline's", out / "wins.png")
    above = sum(e.low > 0 for _, e, _ in wins)
    below = sum(e.high < 0 for _, e, _ in wins)
    return f"""## What the papers claim

"Holds" and "the opposite" mean that the whole interval is on that side of 0; with one seed nothing is decided.

{claims.table(runs)}
Of {len(wins)} comparisons of DisCO's methods with the baselines, {above} are above 0 with their whole interval and
{below} below; so many intervals are not corrected for their number.

![differences](wins.png)
"""


def _ablations(runs: Runs, out: Path) -> str:
    if not (rows := tables.ablation_rows(runs)):
        return ""
    plots.differences([(label, e) for label, _, e in rows], "held-out avg@16, minus unchanged", out / "ablations.png")
    return f"""## Ablations

{tables.ablations(runs)}
![ablations](ablations.png)
"""


def _lengths(runs: Runs, out: Path) -> str:
    if not runs.finished(grids.LENGTH):
        return ""
    plots.lengths(tables.length_points(runs), out / "lengths.png")
    return f"""## Accuracy against length

AES is measured against the same method without its length penalty.

{tables.lengths(runs)}
![lengths](lengths.png)
"""


def delta(runs: Runs) -> float:
    """The constraint's settings in the grid."""
    found = re.search(r"delta=([^ ]+)", " ".join(runs.grid["methods"]["disco_logl"]["overrides"]))
    assert found is not None
    return float(found[1])


def _noise(runs: Runs) -> str:
    errors = [
        e for r in runs.records if r["method"].startswith("disco") for e in r.get("curve", {}).get("kl_stderr", ())
    ]
    if not errors:
        return ""
    low, middle, high = np.percentile(errors, [10, 50, 90])
    return (
        f"The standard error of KL_hat in DisCO's runs is {middle:.1e} (10% to 90%: {low:.1e} to {high:.1e}), so that "
        f"delta stands {delta(runs) / middle:.1f} of them above 0 ({delta(runs) / high:.1f} at the 90% point)."
    )
