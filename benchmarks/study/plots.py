"""The report's figures: curves against steps, differences with intervals, accuracy against length.

Reads Runs; writes PNG files where it is told. Colours follow the method, not its place in a figure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray

from nemo_disco.evaluation.statistics import Estimate

from .grid import MAIN
from .runs import Record, Runs

DPI = 110
PANELS = {
    "reward": "reward",
    "entropy": "entropy of the policy",
    "all_wrong": "questions with no right response",
    "all_right": "questions with right responses alone",
}
SMOOTH = 3  # steps: a step's reward is of 16 questions


def curves(runs: Runs, path: Path) -> None:
    """Mean over seeds, smoothed over SMOOTH steps; DisCO's methods are drawn full, the others dashed."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), sharex=True)
    for axis, (name, title) in zip(axes.flat, PANELS.items(), strict=True):
        for i, (method, label) in enumerate(runs.labels().items()):
            if table := _table(runs.of(MAIN, method), name):
                line = "-" if method.startswith("disco") else "--"
                mean = _smoothed(np.mean(table, axis=0))
                axis.plot(np.arange(1, len(mean) + 1), mean, line, color=f"C{i}", label=label)
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("step")
    axes[0, 0].legend(fontsize=7, ncol=2)
    _save(figure, path)


def kl(runs: Runs, delta: float, path: Path) -> None:
    """KL_hat at each step's last mini-batch with its standard error, and delta."""
    methods = [m for m in runs.labels() if runs.of(MAIN, m)]
    figure, axes = plt.subplots(2, -(-len(methods) // 2), figsize=(12, 5), sharex=True, sharey=True, squeeze=False)
    for axis, method in zip(axes.flat, methods, strict=False):
        records = runs.of(MAIN, method)
        mean, error = (np.mean(_table(records, name), axis=0) for name in ("kl", "kl_stderr"))
        steps = np.arange(1, len(mean) + 1)
        axis.plot(steps, mean, color="C0")
        axis.fill_between(steps, mean - error, mean + error, color="C0", alpha=0.3)
        axis.axhline(delta, color="C3", linestyle=":")
        axis.set_title(runs.labels()[method], fontsize=9)
        axis.set_yscale("symlog", linthresh=delta)
        axis.grid(alpha=0.3)
    _save(figure, path)


def differences(rows: Sequence[tuple[str, Estimate]], title: str, path: Path) -> None:
    """Each row's difference and its interval."""
    figure, axis = plt.subplots(figsize=(8, 0.32 * len(rows) + 1))
    for y, (_, e) in enumerate(reversed(rows)):
        colour = "C7" if e.low <= 0 <= e.high else "C0" if e.low > 0 else "C3"
        axis.plot([e.low, e.high], [y, y], color=colour)
        axis.plot(e.value, y, "o", color=colour, markersize=4)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(rows)), [label for label, _ in reversed(rows)], fontsize=8)
    axis.set_title(title, fontsize=10)
    axis.grid(axis="x", alpha=0.3)
    _save(figure, path)


def lengths(points: Mapping[str, Sequence[tuple[str, float, float]]], path: Path) -> None:
    """By family: (setting, mean response length, accuracy), one point each."""
    figure, axis = plt.subplots(figsize=(7, 4.5))
    for i, (family, values) in enumerate(points.items()):
        ordered = sorted(values, key=lambda v: v[1])
        axis.plot([v[1] for v in ordered], [v[2] for v in ordered], "o-", color=f"C{i}", label=family, markersize=5)
        for setting, x, y in ordered:
            axis.annotate(setting, (x, y), fontsize=7, xytext=(3, 3), textcoords="offset points")
    axis.set_xlabel("mean response length, tokens")
    axis.set_ylabel("held-out avg@16")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    _save(figure, path)


def _table(records: Sequence[Record], name: str) -> list[list[float]]:
    """A row a seed, of the runs that went on to the end."""
    return [r["curve"][name] for r in records if "failed" not in r]


def _smoothed(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean of each step and the ones before, SMOOTH at most."""
    return np.array([values[max(0, i - SMOOTH + 1) : i + 1].mean() for i in range(len(values))])


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
