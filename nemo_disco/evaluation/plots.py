"""PNG plots and a CSV of several runs' metrics, for papers and spreadsheets. Only this module imports matplotlib."""

from __future__ import annotations

import csv
from pathlib import Path

from nemo_disco.evaluation.run_data import Run, read_runs
from nemo_disco.evaluation.statistics import bootstrap
from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.files import atomic_file, writing

PLOTS = {
    "reward/mean": "reward",
    "policy/kl_after": "KL to the old policy, after the step's last update",
    "constraint/kl_after_over_delta": "KL after the step's last update, over delta",
    "policy/kl": "KL to the old policy",
    "policy/kl_k3": "KL to the old policy, k3",
    "policy/entropy": "entropy",
    "response/length_mean": "response length (tokens)",
    "groups/mixed": "share of mixed groups",
    "groups/all_wrong": "share of questions all wrong",
    "groups/all_right": "share of questions all right",
    "groups/never_solved": "share of questions never solved so far",
    "dro/effective_sample": "effective sample size of the DRO weights",
    "grad_norm": "gradient norm",
    "time/step": "seconds a step",
}
# Metric -> that of its standard error, drawn as a band.
ERRORS = {"policy/kl": "policy/kl_stderr", "policy/kl_k3": "policy/kl_k3_stderr"}


def write_plots(run_dirs: list[Path], directory: Path) -> list[Path]:
    """Write metrics.csv (run, step, metric, value) and a PNG for each metric of PLOTS and each evaluation set; return
    their paths. Raises UserError as read_runs does, and without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("agg")
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(f"plots need matplotlib ({error}): pip install 'nemo-disco[plots]'") from error
    runs = read_runs(run_dirs)
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
    paths = [_write_csv(runs, directory / "metrics.csv")]
    sets = dict.fromkeys(result.name for run in runs for result in run.evaluations)
    for name, title in [*PLOTS.items(), *((f"pass@1 {s}", f"Pass@1, {s}") for s in sets)]:
        figure = Figure(figsize=(6, 3.6), layout="constrained")
        axes = figure.subplots()
        has_curve = [_draw(axes, run, name, f"C{i % 10}") for i, run in enumerate(runs)]
        if not any(has_curve):
            continue
        if name in ("policy/kl_after", *ERRORS) and (deltas := {run.delta for run in runs if run.delta is not None}):
            for delta in deltas:
                axes.axhline(delta, color="gray", linestyle="--", linewidth=1, label=f"delta = {delta:g}")
        axes.set(xlabel="step", title=title)
        axes.grid(alpha=0.3)
        axes.legend()
        paths.append(directory / f"{name.replace('/', '_').replace('@', '').replace(' ', '_')}.png")
        with atomic_file(paths[-1]) as work:
            figure.savefig(work, dpi=150, format="png")
    return paths


def _draw(axes: object, run: Run, name: str, color: str) -> bool:
    """Draw a run's curve: an evaluation's with its 95% intervals, an estimate's with its standard error. Returns False
    if the run has no values."""
    if name.startswith("pass@1 "):
        results = [result for result in run.evaluations if result.name == name.removeprefix("pass@1 ")]
        estimates = [bootstrap(result.correct.mean(axis=1)) for result in results]
        steps, values = [r.step for r in results], [e.value for e in estimates]
        errors = [[e.value - e.low for e in estimates], [e.high - e.value for e in estimates]]
        if values:
            axes.errorbar(steps, values, errors, color=color, marker="o", capsize=3, label=run.label)  # type: ignore[attr-defined]
        return bool(values)
    points = [(s, v) for s, v in zip(run.steps, run.series(name), strict=True) if v is not None]
    if points:
        axes.plot(*zip(*points, strict=True), color=color, label=run.label)  # type: ignore[attr-defined]
    columns = zip(run.steps, run.series(name), run.series(ERRORS.get(name, "")), strict=True)
    if band := [(s, v - e, v + e) for s, v, e in columns if v is not None and e is not None]:
        axes.fill_between(*zip(*band, strict=True), color=color, alpha=0.16, linewidth=0)  # type: ignore[attr-defined]
    return bool(points)


def _write_csv(runs: list[Run], path: Path) -> Path:
    with atomic_file(path) as work, work.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("run", "step", "metric", "value"))
        for run in runs:
            for name in run.names:
                for step, value in zip(run.steps, run.series(name), strict=True):
                    if value is not None:
                        writer.writerow((run.label, step, name, repr(value)))
    return path
