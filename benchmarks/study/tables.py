"""The report's tables as Markdown, and the numbers that its figures show.

Reads FinishedRuns and formats numbers. claims.py draws conclusions from them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nemo_disco.evaluation.statistics import Estimate, accuracy_efficiency_score

from . import grid as grids
from .candidates import list_candidates
from .results_file import Record
from .runs import FinishedRuns
from .statistics import collect_shares, estimate_difference, estimate_mean

LAST = 4  # the final steps of training, over which its figures are averaged
# Family of length methods -> the same method without its length penalty.
WITHOUT_PENALTY = {"DRPO": "DisCO log-L", "RLOO-LP": "RLOO", "ALP": "GRPO", "HAPO": "GRPO"}


def format_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def format_estimate(e: Estimate | None) -> str:
    return "" if e is None else f"{e.value:.3f} [{e.low:.3f}, {e.high:.3f}]"


def format_difference(e: Estimate | None) -> str:
    return "" if e is None else f"{e.value:+.3f} [{e.low:+.3f}, {e.high:+.3f}]"


def format_final_mean(records: Sequence[Record], name: str) -> str:
    """The mean of the curve `name` over its last steps and over seeds."""
    values = [np.mean(r["curve"][name][-LAST:]) for r in records if "failed" not in r]
    return f"{np.mean(values):.3g}" if values else ""


def tabulate_parts(runs: FinishedRuns) -> str:
    """The table of finished and planned runs in each part of the study."""
    parts = (grids.TUNING, grids.MAIN, grids.ABLATIONS, grids.LENGTH)
    rows = [(part, str(runs.count_finished(part)), str(runs.count_planned(part))) for part in parts]
    return format_table(("part", "runs finished", "planned"), rows)


def tabulate_tuning(runs: FinishedRuns) -> str:
    """The table of Pass@1 by method and learning rate; the chosen rate is bold."""
    candidates = list_candidates(runs.grid["tuning"])
    rows = []
    for method, label in runs.method_labels().items():
        scores = grids.score_candidates(method, runs.records)
        best = grids.choose_candidate(method, runs.records, candidates)
        cells = {c: f"{scores[c]:.3f}" if c in scores else "" for c in candidates}
        rows.append((label, *(f"**{text}**" if c == best else text for c, text in cells.items())))
    return format_table(("method", *(f"{c.learning_rate:g}" for c in candidates)), rows)


def tabulate_main(runs: FinishedRuns) -> str:
    """The table of the main comparison: accuracies, their differences to GRPO, and figures of the end of training."""
    grpo = collect_shares(runs.select(grids.MAIN, "grpo"))
    rows = []
    for method, label in runs.method_labels().items():
        records = runs.select(grids.MAIN, method)
        values = collect_shares(records)
        if not values:
            continue
        minus_grpo = estimate_difference(values, grpo) if method != "grpo" else None
        ends = (format_final_mean(records, name) for name in ("reward", "entropy", "all_wrong", "all_right", "length"))
        rate = f"{records[0]['learning_rate']:g}"
        accuracy, gain = format_estimate(estimate_mean(values)), format_difference(minus_grpo)
        rows.append((label, rate, str(len(values)), accuracy, gain, *ends))
    head = ("method", "lr", "seeds", "held-out avg@16", "minus GRPO", "reward", "entropy", "0% right", "100% right")
    return format_table((*head, "length"), rows)


def compare_ablations(runs: FinishedRuns) -> list[tuple[str, int, Estimate]]:
    """(label, number of seeds, accuracy of the changed method minus that of the unchanged one) for each ablation.

    Only seeds that both have count; an ablation without such a seed is left out.
    """
    labels, rows = runs.method_labels(), []
    for v in runs.grid.get("ablations", {"variants": ()})["variants"]:
        unchanged = collect_shares(runs.select(grids.MAIN, v["of"]))
        changed = collect_shares(runs.select(grids.ABLATIONS, f"{v['of']}.{v['name']}"))
        if (e := estimate_difference(changed, unchanged)) is not None:
            rows.append((f"{labels[v['of']]}: {v['label']}", len(set(unchanged) & set(changed)), e))
    for score in ("logl", "lratio"):  # DisCO-b is DisCO without DRO
        unchanged, changed = (collect_shares(runs.select(grids.MAIN, f"{m}_{score}")) for m in ("disco", "disco_b"))
        if (e := estimate_difference(changed, unchanged)) is not None:
            rows.append((f"{labels[f'disco_{score}']}: no DRO", len(set(unchanged) & set(changed)), e))
    return rows


def tabulate_ablations(runs: FinishedRuns) -> str:
    rows = [(label, str(seeds), format_difference(e)) for label, seeds, e in compare_ablations(runs)]
    return format_table(("changed", "seeds", "held-out avg@16, minus unchanged"), rows)


def collect_length_points(runs: FinishedRuns) -> dict[str, list[tuple[str, float, float]]]:
    """Family of methods -> (setting, mean length in tokens, accuracy) of each of its settings, as means over seeds.

    The families are the length methods and the methods without penalty that they are compared with.
    """
    points: dict[str, list[tuple[str, float, float]]] = {}
    for v in runs.grid.get("length", {"variants": ()})["variants"]:
        family, _, setting = v["label"].partition(" ")
        if (point := _mean_point(runs.select(grids.LENGTH, f"{v['of']}.{v['name']}"))) is not None:
            points.setdefault(family, []).append((setting, *point))
    for method, label in (("disco_logl", "DisCO log-L"), ("grpo", "GRPO")):
        seeds = set(runs.grid.get("length", {"seeds": ()})["seeds"])
        if (point := _mean_point([r for r in runs.select(grids.MAIN, method) if r["seed"] in seeds])) is not None:
            points[label] = [("", *point)]
    return points


def tabulate_lengths(runs: FinishedRuns) -> str:
    """The table of accuracy, mean length and AES of the length methods and of the methods without penalty."""
    points, rows = collect_length_points(runs), []
    for family, values in points.items():
        reference = points.get(WITHOUT_PENALTY.get(family, ""))
        for setting, length, accuracy in values:
            score = against = ""
            if reference is not None:
                _, reference_length, reference_accuracy = reference[0]
                score = f"{accuracy_efficiency_score(length, accuracy, (reference_length, reference_accuracy)):+.2f}"
                against = WITHOUT_PENALTY[family]
            rows.append((f"{family} {setting}".strip(), f"{accuracy:.3f}", f"{length:.1f}", score, against))
    return format_table(("method", "held-out avg@16", "length", "AES", "against"), rows)


def _mean_point(records: Sequence[Record]) -> tuple[float, float] | None:
    """(mean length in tokens, accuracy) over the runs that did not fail; None if there are none."""
    completed = [r for r in records if "failed" not in r]
    if not completed:
        return None
    length = np.mean([np.mean(r["evaluation"]["length"]) for r in completed])
    return float(length), float(np.mean([grids.pass_at_1(r) for r in completed]))
