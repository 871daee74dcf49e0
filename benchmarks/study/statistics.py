"""Accuracies on the same held-out questions over several seeds, and their differences, with 95% bootstrap intervals.

The bootstrap resamples both seeds and questions, since a repetition of the study would have other ones of both. Pure
numpy with a fixed seed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_disco.evaluation.statistics import CONFIDENCE, Estimate

RESAMPLES = 4000
Shares = dict[int, NDArray[np.float64]]  # seed -> share of right samples of each question, [questions]


def collect_shares(records: Iterable[Mapping[str, Any]]) -> Shares:
    """The shares of right samples of a method's runs, without the runs whose training failed."""
    return {
        r["seed"]: np.array(r["evaluation"]["correct"]) / r["evaluation"]["samples"]
        for r in records
        if "failed" not in r
    }


def estimate_mean(values: Shares) -> Estimate:
    """The mean accuracy over seeds and questions, with its interval."""
    return _bootstrap(np.stack(list(values.values())))


def estimate_difference(a: Shares, b: Shares) -> Estimate | None:
    """The mean of a minus b, paired by seed and question, with its interval; None if they have no seed in common."""
    common = sorted(set(a) & set(b))
    return _bootstrap(np.stack([a[s] - b[s] for s in common])) if common else None


def _bootstrap(matrix: NDArray[np.float64]) -> Estimate:
    """The mean of a matrix [seeds, questions] and its interval, from resampled seeds and questions."""
    rng = np.random.default_rng(0)
    # How often each resample draws each seed, [RESAMPLES, seeds], and each question, [RESAMPLES, questions].
    seed_counts, question_counts = (rng.multinomial(n, [1 / n] * n, size=RESAMPLES) for n in matrix.shape)
    means = ((seed_counts @ matrix) * question_counts).sum(1) / matrix.size
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(means, [tail, 100 - tail])
    return Estimate(float(matrix.mean()), float(low), float(high))
