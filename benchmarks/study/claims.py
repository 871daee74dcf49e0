"""The papers' claims, and the verdict of these runs on each: holds, the opposite, or not decided, by an interval.

A claim that compares methods is about the accuracies' difference, question by question, over common seeds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nemo_disco.evaluation.statistics import Estimate

from . import grid as grids
from .runs import Runs
from .statistics import difference, shares
from .tables import LAST, WITHOUT_PENALTY, length_points, markdown, signed

BASELINES = ("grpo", "grpo_er", "dr_grpo", "grpo_rw", "dapo", "trpa")
OURS = ("disco_b_logl", "disco_b_lratio", "disco_logl", "disco_lratio")


def verdict(e: Estimate | None, seeds: int) -> str:
    """Of a difference that the claim says is above 0."""
    if e is None:
        return "not run"
    if seeds < 2:
        return "one seed: not decided"
    return "holds" if e.low > 0 else "the opposite" if e.high < 0 else "not decided"


def table(runs: Runs) -> str:
    head = ("claim", "first minus second, held-out avg@16", "seeds", "here")
    return markdown(head, [*_accuracy(runs), *_entropy(runs), *_length(runs)])


def wins(runs: Runs) -> list[tuple[str, Estimate, int]]:
    """Each of DisCO's methods minus each baseline, over common seeds."""
    labels, found = runs.labels(), []
    for ours in OURS:
        for baseline in BASELINES:
            e, seeds = _difference(runs, ours, baseline)
            if e is not None:
                found.append((f"{labels[ours]} - {labels[baseline]}", e, seeds))
    return found


def _accuracy(runs: Runs) -> list[Sequence[str]]:
    main, ablation = grids.MAIN, grids.ABLATIONS
    pairs = [
        *((f"{a} above GRPO", (main, a), (main, "grpo")) for a in OURS),
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
            "the exact constraint beats one per micro-batch (ours)",
            (main, "disco_logl"),
            (ablation, "disco_logl.per_micro_batch"),
        ),
    ]
    labels = runs.labels()
    rows = []
    for words, first, second in pairs:
        values = [shares(runs.of(*side)) for side in (first, second)]
        e, seeds = difference(*values), len(set(values[0]) & set(values[1]))
        words = " ".join(labels.get(word, word) for word in words.split())
        rows.append((words, signed(e), str(seeds), verdict(e, seeds)))
    return rows


def _entropy(runs: Runs) -> list[Sequence[str]]:
    """GRPO's entropy falls, DisCO's does not: the share of the first step's entropy that is left at the end."""
    rows = []
    for first in ("disco_logl", "disco_lratio"):
        left = {m: _entropy_left(runs, m) for m in (first, "grpo")}
        seeds = sorted(set(left[first]) & set(left["grpo"]))
        gaps = [left[first][s] - left["grpo"][s] for s in seeds]
        words = f"{runs.labels()[first]} keeps more of its entropy than GRPO"
        if not gaps:
            rows.append((words, "", "0", "not run"))
            continue
        here = "holds" if min(gaps) > 0 else "the opposite" if max(gaps) < 0 else "not decided"
        here = "one seed: not decided" if len(seeds) < 2 else f"{here} (all seeds must agree)"
        rows.append((words, f"{np.mean(gaps):+.2f} of the entropy at the start", str(len(seeds)), here))
    return rows


def _entropy_left(runs: Runs, method: str) -> dict[int, float]:
    curves = {r["seed"]: r["curve"]["entropy"] for r in runs.of(grids.MAIN, method) if "failed" not in r}
    return {seed: float(np.mean(c[-LAST:]) / c[0]) for seed, c in curves.items()}


def _length(runs: Runs) -> list[Sequence[str]]:
    """A setting of DRPO dominates another method's if it is at least as accurate and at most as long."""
    points = length_points(runs)
    ours = points.get("DRPO", [])
    rows = []
    for family in WITHOUT_PENALTY:
        others = points.get(family, [])
        if family == "DRPO" or not (ours and others):
            continue
        beaten = sum(any(o[1] <= x and o[2] >= y for o in ours) for _, x, y in others)
        beating = sum(any(o[1] <= x and o[2] >= y for o in others) for _, x, y in ours)
        figures = (
            f"{beaten} of {len(others)} settings dominated by one of DRPO's, {beating} of {len(ours)} of DRPO's by one"
        )
        here = "holds" if beaten == len(others) and not beating else "not as a whole"
        rows.append((f"DRPO is shorter at {family}'s accuracy", figures, "", f"{here} (no interval)"))
    return rows


def _difference(runs: Runs, first: str, second: str) -> tuple[Estimate | None, int]:
    a, b = (shares(runs.of(grids.MAIN, name)) for name in (first, second))
    return difference(a, b), len(set(a) & set(b))
