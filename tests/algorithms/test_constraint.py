"""The constraint's estimators and its multiplier, by exact enumeration over a small vocabulary."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_disco.algorithms.objectives.constraint import Constraint

TOKENS = 12


def policies(scale: float) -> tuple[Tensor, Tensor]:
    """Log-probs [TOKENS] of an old policy, and logits of one at a distance `scale`, differentiable."""
    generator = torch.Generator().manual_seed(6)
    logits = torch.randn(TOKENS, generator=generator, dtype=torch.float64)
    move = torch.randn(TOKENS, generator=generator, dtype=torch.float64)
    return logits.log_softmax(0), (logits + scale * move).requires_grad_()


def terms(estimator: str, logits: Tensor, old: Tensor) -> Tensor:
    """[TOKENS] the estimator's term for each token that may be sampled."""
    log_probs = logits.log_softmax(0)
    divergence = (old.exp() * (old - log_probs)).sum().expand(TOKENS)
    return Constraint(kind="squared_hinge", estimator=estimator).token_terms(log_probs, old, divergence)


@pytest.mark.parametrize("estimator", ["k1", "k3", "top_k"])
def test_an_estimator_has_no_bias_in_value_and_gradient(estimator: str) -> None:
    old, logits = policies(0.7)
    exact = (old.exp() * (old - logits.log_softmax(0))).sum()
    estimate = (old.exp() * terms(estimator, logits, old)).sum()
    torch.testing.assert_close(estimate, exact, rtol=1e-12, atol=1e-15)
    for actual, expected in zip(
        *(torch.autograd.grad(x, logits, retain_graph=True) for x in (estimate, exact)), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-14)


def gradient_noise(estimator: str, logits: Tensor, old: Tensor) -> float:
    """Root mean square, over sampled tokens, of the gradient of one token's term minus its expectation."""
    rows = [torch.autograd.grad(term, logits, retain_graph=True)[0] for term in terms(estimator, logits, old)]
    gradients, q = torch.stack(rows), old.exp()[:, None]
    return float((q * (gradients - (q * gradients).sum(0)).square()).sum().sqrt())


def test_near_the_old_policy_the_noise_of_k1_stays_and_that_of_k3_vanishes() -> None:
    """Ten times nearer, the noise of k3's gradient is ten times smaller; that of k1's is what it was."""
    noise = {}
    for scale in (1e-2, 1e-3):
        old, logits = policies(scale)
        noise[scale] = {name: gradient_noise(name, logits, old) for name in ("k1", "k3", "top_k")}
        assert noise[scale]["k3"] < 3 * scale * noise[scale]["k1"]
        assert noise[scale]["top_k"] < 1e-12
    assert noise[1e-3]["k1"] == pytest.approx(noise[1e-2]["k1"], rel=0.02)
    assert noise[1e-3]["k3"] == pytest.approx(noise[1e-2]["k3"] / 10, rel=0.05)


def dual(**changes: Any) -> Constraint:
    settings = {"kind": "dual", "beta": 1.0, "delta": 1e-3, "beta_min": 0.5, "beta_max": 4.0, "rate": 0.2}
    return Constraint(**(settings | changes))


def test_the_multiplier_rises_above_delta_falls_below_it_and_stays_within_its_bounds() -> None:
    assert dual().ascend(1.5e-3).strength == pytest.approx(math.exp(0.2 * 0.5))
    assert dual().ascend(1e-3).strength == pytest.approx(1.0)
    assert dual().ascend(0.0).strength == pytest.approx(math.exp(-0.2))
    assert dual().ascend(1.0).strength == pytest.approx(math.exp(0.2)), "the excess must be cut"
    constraint = dual()
    for _ in range(20):
        constraint = constraint.ascend(1.0)
    assert constraint.strength == 4.0
    for _ in range(40):
        constraint = constraint.ascend(0.0)
    assert constraint.strength == 0.5
    assert dual().ascend(math.nan).strength == 1.0


def test_dual_ascent_finds_the_multiplier_whose_kl_is_delta() -> None:
    """A policy that moves along one line: reward x minus beta KL(x) = beta x^2 / 2 has its maximum at x = 1 / beta,
    where the KL is 1 / (2 beta^2), which is delta at beta = 1 / sqrt(2 delta)."""
    constraint = dual(beta_min=1e-3, beta_max=1e3, delta=1e-2)
    for _ in range(400):
        constraint = constraint.ascend(0.5 / constraint.strength**2)
    assert constraint.strength == pytest.approx(1 / math.sqrt(2e-2), rel=1e-3)


@pytest.mark.parametrize("kind", ["squared_hinge", "kl_regularization", "none"])
def test_other_kinds_have_a_constant_strength(kind: str) -> None:
    constraint = Constraint(kind=kind, delta=1e-3)
    assert constraint.ascend(1.0) is constraint
    assert constraint.with_multiplier(7.0) is constraint
