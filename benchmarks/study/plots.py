"""The report's figures: training curves, differences with intervals, accuracy against length.

Reads FinishedRuns and writes a PNG file to the given path. A method has the same colour in all panels of a figure.
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
from .results_file import Record
from .runs import FinishedRuns

DPI = 110
PANELS = {
    "reward": "reward",
    "entropy": "entropy of the policy",
    "all_wrong": "questions with no right response",
    "all_right": "questions with right responses alone",
}
SMOOTH = 3  # steps in a moving average: the curves of a single step, of few questions, are noisy


def plot_curves(runs: FinishedRuns, path: Path) -> None:
    """Plot PANELS against steps for each method: means over seeds, smoothed; DisCO's lines are solid, others dashed."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), sharex=True)
    for axis, (name, title) in zip(axes.flat, PANELS.items(), strict=True):
        for i, (method, label) in enumerate(runs.method_labels().items()):
            if curves := _list_curves(runs.select(MAIN, method), name):
                line = "-" if method.startswith("disco") else "--"
                mean = _smooth(np.mean(curves, axis=0))
                axis.plot(np.arange(1, len(mean) + 1), mean, line, color=f"C{i}", label=label)
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("step")
    axes[0, 0].legend(fontsize=7, ncol=2)
    _save(figure, path)


def plot_kl(runs: FinishedRuns, delta: float, path: Path) -> None:
    """Plot KL_hat of each step's last mini-batch with its standard error (means over seeds), a panel for each method.

    A dotted line shows delta, the bound of the constraint.
    """
    methods = [m for m in runs.method_labels() if runs.select(MAIN, m)]
    figure, axes = plt.subplots(2, -(-len(methods) // 2), figsize=(12, 5), sharex=True, sharey=True, squeeze=False)
    for axis, method in zip(axes.flat, methods, strict=False):
        records = runs.select(MAIN, method)
        mean, error = (np.mean(_list_curves(records, name), axis=0) for name in ("kl", "kl_stderr"))
        steps = np.arange(1, len(mean) + 1)
        axis.plot(steps, mean, color="C0")
        axis.fill_between(steps, mean - error, mean + error, color="C0", alpha=0.3)
        axis.axhline(delta, color="C3", linestyle=":")
        axis.set_title(runs.method_labels()[method], fontsize=9)
        axis.set_yscale("symlog", linthresh=delta)
        axis.grid(alpha=0.3)
    _save(figure, path)


def plot_differences(rows: Sequence[tuple[str, Estimate]], title: str, path: Path) -> None:
    """Plot a line for each (label, difference): blue if its interval is above 0, red if below, else grey."""
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


def plot_lengths(points: Mapping[str, Sequence[tuple[str, float, float]]], path: Path) -> None:
    """Plot accuracy against length, a line for each family of methods.

    points: family -> (setting, mean response length in tokens, accuracy) of each of its settings.
    """
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


def _list_curves(records: Sequence[Record], name: str) -> list[list[float]]:
    """The curve `name` [steps] of each run that did not fail."""
    return [r["curve"][name] for r in records if "failed" not in r]


def _smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The moving average [steps] of each step and the steps before it, SMOOTH steps at most."""
    return np.array([values[max(0, i - SMOOTH + 1) : i + 1].mean() for i in range(len(values))])


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
