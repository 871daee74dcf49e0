"""The report: one self-contained HTML page on one or several run directories, which needs no network.

Tables are rendered here; curves and the rollout browser by assets/*.js in the reader's browser, from data in the page.
Writes the page, once or (`watch`) whenever a run's files change, and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import time
from importlib import resources
from pathlib import Path
from typing import Any

from nemo_disco.evaluation.rollout_pack import pack_rollouts
from nemo_disco.evaluation.run_data import Run, read_runs
from nemo_disco.evaluation.statistics import bootstrap
from nemo_disco.evaluation.table import HEADER, Row, compare, setup_differences
from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.files import write_atomically
from nemo_disco.runtime.rundir import RunDirectory

SCRIPTS = ("charts.js", "curves.js", "tokens.js", "browser.js")
PHASES = ("generate", "grade", "log_probs", "train", "refit")
POLL_S = 5.0
RELOAD_S = 15


def write_report(run_dirs: list[Path], out: Path | None = None, reload_s: int | None = None) -> Path:
    """Write the page (default: report.html in the first run directory) and return its path.

    reload_s: seconds after which an open page reloads itself. Raises UserError if a directory is not a run's, or if the
    page cannot be written. The page notes missing parts of a run.
    """
    runs = read_runs(run_dirs)
    path = out or runs[0].directory.report
    if path.is_dir():
        raise UserError(f"{path} is a directory; give the report a file name")
    write_atomically(path, render(runs, reload_s))
    return path


def watch(runs: list[Path], out: Path | None) -> int:
    """Rewrite the page whenever a run's files change, until KeyboardInterrupt; then once more, as a page that does not
    reload itself. Returns 0, the exit code of `report --watch`. Raises UserError as write_report does.
    """
    last_state: object = None
    try:
        while True:
            state = [_file_states(run) for run in runs]
            if state != last_state:
                path = write_report(runs, out, reload_s=RELOAD_S)
                print(f"{time.strftime('%H:%M:%S')} {path}", flush=True)
                last_state = state
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        print(write_report(runs, out))
        return 0


def _file_states(path: Path) -> list[tuple[str, int, int]]:
    """Name, size and modification time of each file of a run that the page shows."""
    run = RunDirectory(path)
    files = [run.metrics, run.config, *sorted(run.evaluation.glob("*.json")), *sorted(run.rollouts.glob("*.jsonl"))]
    states = []
    for file in files:
        with contextlib.suppress(FileNotFoundError):  # the run may remove a file at any time
            stat = file.stat()
            states.append((file.name, stat.st_size, stat.st_mtime_ns))
    return states


def render(runs: list[Run], reload_s: int | None = None) -> str:
    """The page as HTML text."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    packed = pack_rollouts(runs)
    data = {"runs": [_run_data(run) for run in runs], "phases": PHASES, "index": packed.index}
    keys, differing = _configuration(runs)
    return environment.from_string(_asset("report.html.jinja")).render(
        css=_asset("report.css"),
        js="\n".join(map(_asset, SCRIPTS)),
        data=_for_script_tag(data),
        chunks=packed.chunks,
        tokens=packed.tokens,
        rollout_note=packed.note,
        runs=runs,
        reload_s=reload_s,
        created=time.strftime("%Y-%m-%d %H:%M"),
        summaries=[_summarize(run) for run in runs],
        tables=_accuracy_tables(runs),
        header=HEADER,
        config_keys=keys,
        differing=differing,
        setting=_setting,
    )


def _accuracy_tables(runs: list[Run]) -> list[dict[str, Any]]:
    """A table for each run and set: its first evaluation against its last; no change for a set evaluated only once.

    run: the run's number; name: the set's; steps: those of the two evaluations; note: a sentence on differences between
    them apart from the weights, or "".
    """
    tables = []
    for number, run in enumerate(runs):
        for name in dict.fromkeys(r.name for r in run.evaluations):
            results = [r for r in run.evaluations if r.name == name]
            first, last = results[0], results[-1]
            rows = compare(first, last)
            if first is last:
                rows = [Row(row.metric, row.before, None, None) for row in rows]
            table = {"run": number, "label": run.label, "name": name, "questions": first.questions, "rows": rows}
            tables.append(table | {"steps": (first.step, last.step), "note": setup_differences(first, last)})
    return tables


def _run_data(run: Run) -> dict[str, Any]:
    return {
        "label": run.label,
        "steps": run.steps,
        "series": {name: run.series(name) for name in run.names},
        "delta": run.delta,
        "accuracy": _accuracy(run),
    }


def _accuracy(run: Run) -> dict[str, list[dict[str, Any]]]:
    """Set -> points (step, value, low, high) of its Pass@1; without an interval if only metrics.jsonl has the value."""
    points: dict[str, dict[int, dict[str, Any]]] = {}
    for name in run.names:
        if name.startswith("eval/") and name.endswith("/pass@1"):
            by_step = points.setdefault(name.removeprefix("eval/").removesuffix("/pass@1"), {})
            for step, value in zip(run.steps, run.series(name), strict=True):
                if value is not None:
                    by_step[step] = {"step": step, "value": value, "low": value, "high": value}
    for result in run.evaluations:
        per_question = result.per_question()["pass@1"]
        assert per_question is not None
        points.setdefault(result.name, {})[result.step] = {"step": result.step, **vars(bootstrap(per_question))}
    return {name: [by_step[step] for step in sorted(by_step)] for name, by_step in points.items()}


def _summarize(run: Run) -> dict[str, str]:
    """A run's line in the overview, as text. constraint: number of steps in which the constraint was active."""
    times = [t for t in run.series("time/step") if t is not None]
    rewards = [r for r in run.series("reward/mean") if r is not None]
    active = [a for a in run.series("constraint/active") if a is not None]
    last_tenth = rewards[-max(1, len(rewards) // 10) :]
    total = f"{sum(times) / 3600:,.2f} h" if sum(times) >= 3600 else f"{sum(times) / 60:,.1f} min"
    return {
        "label": run.label,
        "steps": f"{run.steps[-1]:,}" if run.steps else "-",
        "reward": f"{rewards[0]:.3f} → {sum(last_tenth) / len(last_tenth):.3f}" if rewards else "-",
        "constraint": f"{sum(a > 0 for a in active):,} of {len(active):,}" if active else "-",
        "step_time": f"{sum(times) / len(times):,.1f} s" if times else "-",
        "total_time": total if times else "-",
    }


def _configuration(runs: list[Run]) -> tuple[list[str], list[str]]:
    """All configuration keys of the runs, and those whose values differ between runs with a configuration."""
    configs = [run.config for run in runs if run.config]
    keys = sorted(dict.fromkeys(key for config in configs for key in config))
    return keys, [key for key in keys if len({_setting(config, key) for config in configs}) > 1]


def _setting(config: dict[str, Any], key: str) -> str:
    if key not in config:
        return "(not set)"
    return json.dumps(config[key], ensure_ascii=False, default=str)  # YAML has values that JSON lacks


def _for_script_tag(data: Any) -> str:
    """JSON text that cannot close the script element around it, whatever texts it contains."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _asset(name: str) -> str:
    return (resources.files("nemo_disco.evaluation") / "assets" / name).read_text(encoding="utf-8")
