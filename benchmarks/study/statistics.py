"""Accuracies of several seeds on the same held-out questions, and their differences, with 95% bootstrap intervals.

Seeds and questions are both resampled: what varies is the run as well as the question. Pure numpy, seeded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_disco.evaluation.statistics import CONFIDENCE, Estimate

RESAMPLES = 4000
Shares = dict[int, NDArray[np.float64]]  # by seed, each question's share of right samples


def shares(records: Iterable[Mapping[str, Any]]) -> Shares:
    """Of the runs that were not ended by their divergence."""
    return {
        r["seed"]: np.array(r["evaluation"]["correct"]) / r["evaluation"]["samples"]
        for r in records
        if "failed" not in r
    }


def estimate(values: Shares) -> Estimate:
    """The mean over seeds and questions."""
    return _bootstrap(np.stack(list(values.values())))


def difference(a: Shares, b: Shares) -> Estimate | None:
    """a minus b over the seeds that both have, question by question; None if there is none."""
    common = sorted(set(a) & set(b))
    return _bootstrap(np.stack([a[s] - b[s] for s in common])) if common else None


def _bootstrap(matrix: NDArray[np.float64]) -> Estimate:
    """matrix [seeds, questions]."""
    rng = np.random.default_rng(0)
    # How often each seed, and each question, is drawn in each resample.
    drawn_seeds, drawn_questions = (rng.multinomial(n, [1 / n] * n, size=RESAMPLES) for n in matrix.shape)
    means = ((drawn_seeds @ matrix) * drawn_questions).sum(1) / matrix.size
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(means, [tail, 100 - tail])
    return Estimate(float(matrix.mean()), float(low), float(high))


def aes(accuracy: float, length: float, reference_accuracy: float, reference_length: float) -> float:
    """The accuracy-efficiency score against the same method without its length penalty, as the figures of arXiv
    2510.04474 imply it: the share of length saved, minus 10 times the share of accuracy lost (a gain is nothing)."""
    lost = max(0.0, reference_accuracy - accuracy) / reference_accuracy
    return (reference_length - length) / reference_length - 10 * lost
