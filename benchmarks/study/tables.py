"""The report's tables, as Markdown, and the rows behind its figures.

Reads Runs; formats numbers. What a difference means is said in claims.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nemo_disco.evaluation.statistics import Estimate

from . import grid as grids
from .runs import Record, Runs
from .statistics import aes, difference, estimate, shares

LAST = 4  # steps over which the end of training is averaged


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def shown(e: Estimate | None) -> str:
    return "" if e is None else f"{e.value:.3f} [{e.low:.3f}, {e.high:.3f}]"


def signed(e: Estimate | None) -> str:
    return "" if e is None else f"{e.value:+.3f} [{e.low:+.3f}, {e.high:+.3f}]"


def at_end(records: Sequence[Record], name: str) -> str:
    """The mean of a curve's last steps, over seeds."""
    values = [np.mean(r["curve"][name][-LAST:]) for r in records if "failed" not in r]
    return f"{np.mean(values):.3g}" if values else ""


def parts(runs: Runs) -> str:
    names = (grids.TUNING, grids.MAIN, grids.ABLATIONS, grids.LENGTH)
    return markdown(
        ("part", "runs finished", "planned"), [(n, str(runs.finished(n)), str(runs.planned(n))) for n in names]
    )


def tuning(runs: Runs) -> str:
    rates = [float(rate) for rate in runs.grid["tuning"]["learning_rates"]]
    rows = []
    for method, label in runs.labels().items():
        found = {r["learning_rate"]: grids.pass_at_1(r) for r in runs.of(grids.TUNING, method)}
        best = grids.best_learning_rate(method, runs.records, len(rates))
        cells = [f"{found[rate]:.3f}" if rate in found else "" for rate in rates]
        rows.append((label, *(f"**{c}**" if rate == best else c for rate, c in zip(rates, cells, strict=True))))
    return markdown(("method", *(f"{rate:g}" for rate in rates)), rows)


def main(runs: Runs) -> str:
    grpo = shares(runs.of(grids.MAIN, "grpo"))
    rows = []
    for method, label in runs.labels().items():
        records = runs.of(grids.MAIN, method)
        values = shares(records)
        if not values:
            continue
        against = difference(values, grpo) if method != "grpo" else None
        ends = (at_end(records, name) for name in ("reward", "entropy", "all_wrong", "all_right", "length"))
        rate = f"{records[0]['learning_rate']:g}"
        rows.append((label, rate, str(len(values)), shown(estimate(values)), signed(against), *ends))
    head = ("method", "lr", "seeds", "held-out avg@16", "minus GRPO", "reward", "entropy", "0% right", "100% right")
    return markdown((*head, "length"), rows)


def ablation_rows(runs: Runs) -> list[tuple[str, int, Estimate]]:
    """(what was changed, seeds, its accuracy minus that of the method it was changed in), over the seeds of both."""
    labels, rows = runs.labels(), []
    for v in runs.grid.get("ablations", {"variants": ()})["variants"]:
        base = shares(runs.of(grids.MAIN, v["of"]))
        changed = shares(runs.of(grids.ABLATIONS, f"{v['of']}.{v['name']}"))
        if (found := difference(changed, base)) is not None:
            rows.append((f"{labels[v['of']]}: {v['label']}", len(set(base) & set(changed)), found))
    for score in ("logl", "lratio"):
        base, changed = (shares(runs.of(grids.MAIN, f"{name}_{score}")) for name in ("disco", "disco_b"))
        if (found := difference(changed, base)) is not None:
            rows.append((f"{labels[f'disco_{score}']}: no DRO", len(set(base) & set(changed)), found))
    return rows


def ablations(runs: Runs) -> str:
    rows = [(label, str(seeds), signed(e)) for label, seeds, e in ablation_rows(runs)]
    return markdown(("changed", "seeds", "held-out avg@16, minus unchanged"), rows)


def length_points(runs: Runs) -> dict[str, list[tuple[str, float, float]]]:
    """By family, (setting, mean length, accuracy), with the methods that they are measured against."""
    points: dict[str, list[tuple[str, float, float]]] = {}
    for v in runs.grid.get("length", {"variants": ()})["variants"]:
        family, _, setting = v["label"].partition(" ")
        if (point := _point(runs.of(grids.LENGTH, f"{v['of']}.{v['name']}"))) is not None:
            points.setdefault(family, []).append((setting, *point))
    for method, label in (("disco_logl", "DisCO log-L"), ("grpo", "GRPO")):
        seeds = set(runs.grid.get("length", {"seeds": ()})["seeds"])
        if (point := _point([r for r in runs.of(grids.MAIN, method) if r["seed"] in seeds])) is not None:
            points[label] = [("", *point)]
    return points


WITHOUT_PENALTY = {"DRPO": "DisCO log-L", "RLOO-LP": "RLOO", "ALP": "GRPO", "HAPO": "GRPO"}


def lengths(runs: Runs) -> str:
    points, rows = length_points(runs), []
    for family, values in points.items():
        reference = points.get(WITHOUT_PENALTY.get(family, ""))
        for setting, length, accuracy in values:
            score = "" if reference is None else f"{aes(accuracy, length, reference[0][2], reference[0][1]):+.2f}"
            against = "" if reference is None else WITHOUT_PENALTY[family]
            rows.append((f"{family} {setting}".strip(), f"{accuracy:.3f}", f"{length:.1f}", score, against))
    return markdown(("method", "held-out avg@16", "length", "AES", "against"), rows)


def _point(records: Sequence[Record]) -> tuple[float, float] | None:
    """(mean length, accuracy) over seeds."""
    done = [r for r in records if "failed" not in r]
    if not done:
        return None
    length = np.mean([np.mean(r["evaluation"]["length"]) for r in done])
    return float(length), float(np.mean([grids.pass_at_1(r) for r in done]))
