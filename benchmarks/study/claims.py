"""The papers' claims, and the conclusion of these runs on each: it holds, the opposite holds, or neither is decided.

Methods are compared by the difference of their accuracies with its interval, paired by question and seed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nemo_disco.evaluation.statistics import Estimate

from . import grid as grids
from .runs import FinishedRuns
from .statistics import collect_shares, estimate_difference
from .tables import LAST, WITHOUT_PENALTY, collect_length_points, format_difference, format_table

BASELINES = ("grpo", "grpo_er", "dr_grpo", "grpo_rw", "dapo", "trpa")
DISCO_METHODS = ("disco_b_logl", "disco_b_lratio", "disco_logl", "disco_lratio")


def decide_claim(e: Estimate | None, seeds: int) -> str:
    """The conclusion on the claim that the difference `e` is above 0, in words, from its interval."""
    if e is None:
        return "not run"
    if seeds < 2:
        return "one seed: not decided"
    return "holds" if e.low > 0 else "the opposite" if e.high < 0 else "not decided"


def tabulate_claims(runs: FinishedRuns) -> str:
    """The table of all claims, as Markdown."""
    head = ("claim", "first minus second, held-out avg@16", "seeds", "here")
    return format_table(head, [*_check_accuracy(runs), *_check_entropy(runs), *_check_length(runs)])


def compare_with_baselines(runs: FinishedRuns) -> list[tuple[str, Estimate]]:
    """(label, accuracy of a DisCO method minus that of a baseline over common seeds) for each pair of such methods."""
    labels, comparisons = runs.method_labels(), []
    for method in DISCO_METHODS:
        for baseline in BASELINES:
            values, others = (collect_shares(runs.select(grids.MAIN, name)) for name in (method, baseline))
            if (e := estimate_difference(values, others)) is not None:
                comparisons.append((f"{labels[method]} - {labels[baseline]}", e))
    return comparisons


def _check_accuracy(runs: FinishedRuns) -> list[Sequence[str]]:
    """Rows of the claims that one method is more accurate than another."""
    main, ablation = grids.MAIN, grids.ABLATIONS
    pairs = [
        *((f"{a} above GRPO", (main, a), (main, "grpo")) for a in DISCO_METHODS),
        ("DisCO above DisCO-b, log-L", (main, "disco_logl"), (main, "disco_b_logl")),
        ("DisCO above DisCO-b, L-ratio", (main, "disco_lratio"), (main, "disco_b_lratio")),
        ("dividing GRPO's question weight out (GRPO_RW) is better", (main, "grpo_rw"), (main, "grpo")),
        ("no question weight is better, log-L", (main, "disco_b_logl"), (ablation, "disco_b_logl.question_weight")),
        (
            "no question weight is better, L-ratio",
            (main, "disco_b_lratio"),
            (ablation, "disco_b_lratio.question_weight"),
        ),
        ("not clipping is better than 0.2, 0.2", (main, "disco_b_lratio"), (ablation, "disco_b_lratio.clip_0.2")),
        ("not clipping is better than 0.2, 0.28", (main, "disco_b_lratio"), (ablation, "disco_b_lratio.clip_0.28")),
        (
            "the constraint beats KL regularisation, log-L",
            (main, "disco_logl"),
            (ablation, "disco_logl.kl_regularization"),
        ),
        (
            "the constraint beats KL regularisation, L-ratio",
            (main, "disco_lratio"),
            (ablation, "disco_lratio.kl_regularization"),
        ),
        (
            "the exact constraint beats one per micro-batch (a claim of this project)",
            (main, "disco_logl"),
            (ablation, "disco_logl.per_micro_batch"),
        ),
    ]
    labels = runs.method_labels()
    rows = []
    for words, first, second in pairs:
        values, others = (collect_shares(runs.select(*part_and_method)) for part_and_method in (first, second))
        e, seeds = estimate_difference(values, others), len(set(values) & set(others))
        claim = " ".join(labels.get(word, word) for word in words.split())
        rows.append((claim, format_difference(e), str(seeds), decide_claim(e, seeds)))
    return rows


def _check_entropy(runs: FinishedRuns) -> list[Sequence[str]]:
    """Rows of the claim that GRPO's entropy falls and DisCO's does not.

    Compared is the share of the first step's entropy that remains at the end; the claim needs it in every seed.
    """
    rows = []
    for first in ("disco_logl", "disco_lratio"):
        remaining = {m: _remaining_entropy(runs, m) for m in (first, "grpo")}
        seeds = sorted(set(remaining[first]) & set(remaining["grpo"]))
        gaps = [remaining[first][s] - remaining["grpo"][s] for s in seeds]
        claim = f"{runs.method_labels()[first]} keeps more of its entropy than GRPO"
        if not gaps:
            rows.append((claim, "", "0", "not run"))
            continue
        conclusion = "holds" if min(gaps) > 0 else "the opposite" if max(gaps) < 0 else "not decided"
        conclusion = "one seed: not decided" if len(seeds) < 2 else f"{conclusion} (all seeds must agree)"
        rows.append((claim, f"{np.mean(gaps):+.2f} of the entropy at the start", str(len(seeds)), conclusion))
    return rows


def _remaining_entropy(runs: FinishedRuns, method: str) -> dict[int, float]:
    """Seed -> the entropy of the last steps divided by that of the first step."""
    curves = {r["seed"]: r["curve"]["entropy"] for r in runs.select(grids.MAIN, method) if "failed" not in r}
    return {seed: float(np.mean(c[-LAST:]) / c[0]) for seed, c in curves.items()}


def _check_length(runs: FinishedRuns) -> list[Sequence[str]]:
    """Rows of the claim that DRPO is shorter than the other length methods at their accuracy.

    A setting of one method dominates a setting of another if it is at least as accurate and at most as long. The claim
    holds if DRPO's settings dominate all of the other method's and none of DRPO's is dominated.
    """
    points = collect_length_points(runs)
    drpo = points.get("DRPO", [])
    rows = []
    for family in WITHOUT_PENALTY:
        others = points.get(family, [])
        if family == "DRPO" or not (drpo and others):
            continue
        dominated = sum(any(o[1] <= x and o[2] >= y for o in drpo) for _, x, y in others)
        drpo_dominated = sum(any(o[1] <= x and o[2] >= y for o in others) for _, x, y in drpo)
        figures = (
            f"DRPO dominates {dominated} of {len(others)} settings of {family}, "
            f"which dominates {drpo_dominated} of {len(drpo)} settings of DRPO"
        )
        conclusion = "holds" if dominated == len(others) and not drpo_dominated else "not as a whole"
        rows.append((f"DRPO is shorter at {family}'s accuracy", figures, "", f"{conclusion} (no interval)"))
    return rows
