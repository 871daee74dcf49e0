"""Accuracy statistics of repeated samples, with bootstrap intervals over questions.

Pure numpy on arrays [questions, samples]; deterministic under a seed. Must not import torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

CONFIDENCE = 0.95
RESAMPLES = 10_000
# Resampled indices in memory at a time: limits a bootstrap to some tens of MB, whatever the number of questions.
INDICES_AT_ONCE = 2_000_000

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean over questions and its 95% interval."""

    value: float
    low: float
    high: float


def avg_at_k(correct: ArrayLike) -> Vector:
    """[questions] share of each question's samples that are correct; its mean is Pass@1 (arXiv 2505.12366, section 5).

    correct: bool [questions, samples]. Raises ValueError if it is empty or not two-dimensional.
    """
    shares: Vector = _matrix(correct).mean(axis=1)
    return shares


def pass_at_k(correct: ArrayLike, k: int) -> Vector:
    """[questions] unbiased estimate of the chance that one of k samples is correct (arXiv 2107.03374, eq. 1).

    1 - C(n - c, k) / C(n, k) for a question with c correct samples of n.
    correct: bool [questions, n]. Raises ValueError unless 1 <= k <= n.
    """
    matrix = _matrix(correct)
    n = matrix.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {n} samples a question: k must be between 1 and {n}")
    counts, inverse = np.unique(matrix.sum(axis=1).astype(np.int64), return_inverse=True)
    chances: Vector = np.array([pass_chance(n, c, k) for c in counts.tolist()])[inverse]
    return chances


def pass_chance(n: int, c: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k): `pass_at_k` of one question with c correct samples of n."""
    # Exact integers: the binomials overflow floats already at usual values of n.
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def maj_at_k(correct: ArrayLike, votes: ArrayLike) -> Vector:
    """[questions] 1 if the most frequent answer is correct, else 0 (arXiv 2203.11171); the mean over tied answers.

    correct: bool [questions, samples]. votes: int [questions, samples], a number for each distinct answer to a
    question, -1 for a sample without an answer, which does not vote. A question without votes counts 0.
    Raises ValueError if the shapes differ.
    """
    matrix, ballots = _matrix(correct), np.asarray(votes, dtype=np.int64)
    if matrix.shape != ballots.shape:
        raise ValueError(f"{ballots.shape} votes for {matrix.shape} samples")
    shares = np.zeros(len(matrix))
    for question, ballot in enumerate(ballots):
        answers, counts = np.unique(ballot[ballot >= 0], return_counts=True)
        winners = answers[counts == counts.max(initial=0)]
        if len(winners):
            shares[question] = np.mean([matrix[question][ballot == answer].mean() for answer in winners])
    return shares


def accuracy_efficiency_score(length: float, accuracy: float, reference: tuple[float, float]) -> float:
    """AES: (L_ref - L) / L_ref - 10 max(0, A_ref - A) / A_ref (as the figures of arXiv 2510.04474 imply).

    A gain in accuracy adds nothing. reference: (L_ref, A_ref) of the same method without its length penalty. Raises
    ValueError unless both are positive.
    """
    reference_length, reference_accuracy = reference
    if reference_length <= 0 or reference_accuracy <= 0:
        raise ValueError(f"a reference of length {reference_length} and accuracy {reference_accuracy} gives no score")
    drop = max(0.0, reference_accuracy - accuracy) / reference_accuracy
    return (reference_length - length) / reference_length - 10 * drop


def bootstrap(per_question: ArrayLike, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """The mean over questions with its percentile bootstrap interval, from resampled questions (not samples).

    per_question: [questions]; for a single question the interval has no width. Raises ValueError if it is empty or not
    finite.
    """
    values = np.asarray(per_question, dtype=np.float64)
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
        raise ValueError(f"expected a non-empty [questions, samples] array, not shape {matrix.shape}")
    return matrix
