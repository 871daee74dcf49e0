"""Accuracy from repeated samples, with the uncertainty that the choice of problems leaves.

Pure numpy on arrays [problems, samples]; deterministic under a seed. Must not import torch, nor know what was graded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

CONFIDENCE = 0.95
RESAMPLES = 10_000
# Resampled indices held at once: bounds the memory of a bootstrap to some tens of MB, whatever the number of problems.
INDICES_AT_ONCE = 2_000_000

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean over problems and its 95% interval."""

    value: float
    low: float
    high: float


def avg_at_k(correct: ArrayLike) -> Vector:
    """[problems] the share of a problem's samples that are correct; its mean is Pass@1 (arXiv 2505.12366, section 5).

    correct: bool [problems, samples]. Raises ValueError if it is empty or not two-dimensional.
    """
    shares: Vector = _matrix(correct).mean(axis=1)
    return shares


def pass_at_k(correct: ArrayLike, k: int) -> Vector:
    """[problems] the chance that k samples hold a correct one, unbiased (arXiv 2107.03374, eq. 1).

    1 - C(n - c, k) / C(n, k) for a problem with c of n samples correct.
    correct: bool [problems, n]. Raises ValueError unless 1 <= k <= n.
    """
    matrix = _matrix(correct)
    n = matrix.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {n} samples a problem: k must be between 1 and {n}")
    counts, which = np.unique(matrix.sum(axis=1).astype(np.int64), return_inverse=True)
    # Exact integers: the binomials overflow floats long before n is unusual.
    chances: Vector = np.array([1.0 - math.comb(n - c, k) / math.comb(n, k) for c in counts.tolist()])[which]
    return chances


def maj_at_k(correct: ArrayLike, votes: ArrayLike) -> Vector:
    """[problems] whether the answer that most samples give is correct (arXiv 2203.11171); a tie counts by its share.

    correct: bool [problems, samples]. votes: int [problems, samples], equal where the answers are, -1 without an
    answer: those do not vote, and a problem without any vote is wrong. Raises ValueError if the shapes differ.
    """
    right, ballots = _matrix(correct), np.asarray(votes, dtype=np.int64)
    if right.shape != ballots.shape:
        raise ValueError(f"{ballots.shape} votes for {right.shape} samples")
    shares = np.zeros(len(right))
    for problem, ballot in enumerate(ballots):
        answers, counts = np.unique(ballot[ballot >= 0], return_counts=True)
        winners = answers[counts == counts.max(initial=0)]
        if len(winners):
            shares[problem] = np.mean([right[problem][ballot == answer].mean() for answer in winners])
    return shares


def accuracy_efficiency_score(length: float, accuracy: float, reference: tuple[float, float]) -> float:
    """AES: (L_ref - L) / L_ref, less 10 |A - A_ref| / A_ref where accuracy drops (as the figures of arXiv 2510.04474
    imply; a gain in accuracy adds nothing).

    reference: (L_ref, A_ref) of the same method without its length penalty. Raises ValueError unless both are positive.
    """
    its_length, its_accuracy = reference
    if its_length <= 0 or its_accuracy <= 0:
        raise ValueError(f"a reference of length {its_length} and accuracy {its_accuracy} gives no score")
    return (its_length - length) / its_length - 10 * max(0.0, its_accuracy - accuracy) / its_accuracy


def bootstrap(per_problem: ArrayLike, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """The mean over problems with its percentile bootstrap interval; problems are resampled, not samples.

    per_problem: [problems]. A single problem has an interval of no width: it says nothing of other problems.
    Raises ValueError if it is empty or not finite.
    """
    values = np.asarray(per_problem, dtype=np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(f"bootstrap needs a non-empty vector of finite values, not shape {values.shape}")
    rng = np.random.default_rng(seed)
    rows = max(1, INDICES_AT_ONCE // len(values))
    means = np.concatenate(
        [
            values[rng.integers(len(values), size=(min(rows, resamples - start), len(values)))].mean(axis=1)
            for start in range(0, resamples, rows)
        ]
    )
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(means, [tail, 100 - tail])
    return Estimate(float(values.mean()), float(low), float(high))


def _matrix(correct: ArrayLike) -> Vector:
    matrix = np.asarray(correct, dtype=np.float64)
    if matrix.ndim != 2 or not matrix.size:
        raise ValueError(f"expected a non-empty [problems, samples] array, not shape {matrix.shape}")
    return matrix
