"""The estimators against enumeration, and the interval against its confidence level."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from nemo_disco.evaluation import statistics
from nemo_disco.evaluation.statistics import Estimate, avg_at_k, bootstrap, pass_at_k


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(n: int) -> None:
    rng = np.random.default_rng(n)
    correct = rng.random((12, n)) < rng.random((12, 1))
    correct[0], correct[1] = True, False
    for k in range(1, n + 1):
        expected = [np.mean([any(row[list(s)]) for s in combinations(range(n), k)]) for row in correct]
        np.testing.assert_allclose(pass_at_k(correct, k), expected, rtol=0, atol=1e-12)


def test_pass_at_one_is_avg_at_k() -> None:
    correct = np.random.default_rng(0).random((50, 16)) < 0.3
    np.testing.assert_allclose(pass_at_k(correct, 1), avg_at_k(correct), atol=1e-12)


def test_large_counts_neither_overflow_nor_round_to_zero() -> None:
    correct = np.zeros((1, 4096), dtype=bool)
    correct[0, 7] = True
    assert pass_at_k(correct, 1024)[0] == pytest.approx(0.25, abs=1e-12)


@pytest.mark.parametrize("k", [0, 5])
def test_k_outside_the_number_of_samples_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=r"between 1 and 4"):
        pass_at_k(np.ones((3, 4), dtype=bool), k)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (4,)])
def test_an_empty_or_one_dimensional_array_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="non-empty"):
        avg_at_k(np.zeros(shape, dtype=bool))


def test_the_interval_agrees_with_the_normal_approximation() -> None:
    values = np.random.default_rng(1).normal(size=400)
    half = 1.96 * values.std() / np.sqrt(len(values))
    estimate = bootstrap(values)
    assert estimate.value == pytest.approx(values.mean())
    assert estimate.low == pytest.approx(values.mean() - half, abs=0.05 * half)
    assert estimate.high == pytest.approx(values.mean() + half, abs=0.05 * half)


def test_the_interval_covers_the_truth_at_its_confidence() -> None:
    rng = np.random.default_rng(2)
    estimates = [bootstrap(rng.binomial(8, 0.4, size=64) / 8, seed=i, resamples=1000) for i in range(300)]
    coverage = np.mean([e.low <= 0.4 <= e.high for e in estimates])
    assert 0.91 <= coverage <= 0.98


def test_the_bootstrap_depends_on_its_seed_but_not_on_its_memory_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(3).random(37)
    first = bootstrap(values, seed=5)
    assert bootstrap(values, seed=5) == first
    assert bootstrap(values, seed=6) != first
    monkeypatch.setattr(statistics, "INDICES_AT_ONCE", 1000)
    assert bootstrap(values, seed=5) == first


def test_equal_values_have_an_interval_without_width() -> None:
    assert bootstrap(np.ones(30)) == Estimate(1.0, 1.0, 1.0)


@pytest.mark.parametrize("values", [[], [0.1, float("nan")], [[0.1]]])
def test_empty_and_non_finite_values_are_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="non-empty vector of finite"):
        bootstrap(values)
