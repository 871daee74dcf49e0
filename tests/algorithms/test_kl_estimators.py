"""The KL to the reference: which estimator's gradient is that of KL(policy || reference) in expectation, and where."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nemo_disco.algorithms import MiniBatch, build_objective
from nemo_disco.algorithms.objectives.scores import reference_kl

COEFFICIENT = 0.5
VOCABULARY = 6
ESTIMATORS = ("k3_weighted", "k2", "k3")


@pytest.fixture
def logits() -> dict[str, Tensor]:
    """Logits [V] of three distributions over the vocabulary."""
    generator = torch.Generator().manual_seed(5)
    names = ("policy", "old", "reference")
    return {name: torch.randn(VOCABULARY, dtype=torch.float64, generator=generator) for name in names}


def kl_gradient(policy: Tensor, reference: Tensor, reverse: bool = False) -> Tensor:
    """[V] gradient of KL(policy || reference), or of its reverse, with respect to the policy's logits."""
    logits = policy.clone().requires_grad_()
    log_p, log_r = logits.log_softmax(0), reference.log_softmax(0)
    kl = (log_r.exp() * (log_r - log_p)).sum() if reverse else (log_p.exp() * (log_p - log_r)).sum()
    return torch.autograd.grad(kl, logits)[0]


def expected_gradient(estimator: str, policy: Tensor, old: Tensor, reference: Tensor) -> Tensor:
    """[V] the expectation, over a token sampled by old, of GRPO's KL gradient with respect to the policy's logits.

    Each token of the vocabulary is a response; their rewards are equal, so that only the KL has a gradient.
    """
    log_p, log_old, log_r = (x.log_softmax(0) for x in (policy, old, reference))
    count = torch.ones(VOCABULARY, dtype=torch.int64)
    batch = MiniBatch(log_p, log_old, count, 0 * count, count.double(), 1, reference_log_probs=log_r)
    settings = {"name": "grpo", "kl_coefficient": COEFFICIENT, "kl_estimator": estimator}
    weights = build_objective(settings)(batch).token_weights * VOCABULARY / COEFFICIENT
    by_logits = torch.eye(VOCABULARY, dtype=torch.float64) - log_p.exp()  # [token, logit] d log_p / d logits
    return (log_old.exp() * weights) @ by_logits


def test_weighted_k3_has_the_gradient_of_the_kl_wherever_the_tokens_come_from(logits: dict[str, Tensor]) -> None:
    true = kl_gradient(logits["policy"], logits["reference"])
    for old in ("old", "policy", "reference"):
        expected = expected_gradient("k3_weighted", logits["policy"], logits[old], logits["reference"])
        torch.testing.assert_close(expected, true, rtol=0, atol=1e-12)


def test_k2_has_the_gradient_of_the_kl_on_policy_only(logits: dict[str, Tensor]) -> None:
    policy, reference = logits["policy"], logits["reference"]
    true = kl_gradient(policy, reference)
    torch.testing.assert_close(expected_gradient("k2", policy, policy, reference), true, rtol=0, atol=1e-12)
    assert (expected_gradient("k2", policy, logits["old"], reference) - true).abs().max() > 0.05


def test_k3_has_the_gradient_of_the_reverse_kl(logits: dict[str, Tensor]) -> None:
    policy, reference = logits["policy"], logits["reference"]
    expected = expected_gradient("k3", policy, policy, reference)
    torch.testing.assert_close(expected, kl_gradient(policy, reference, reverse=True), rtol=0, atol=1e-12)
    assert (expected - kl_gradient(policy, reference)).abs().max() > 0.05


@pytest.mark.parametrize(
    ("estimator", "old", "unbiased"), [("k3_weighted", "old", True), ("k3", "policy", True), ("k3", "old", False)]
)
def test_the_value_is_the_kl_in_expectation(
    estimator: str, old: str, unbiased: bool, logits: dict[str, Tensor]
) -> None:
    log_p, log_old, log_r = (logits[name].log_softmax(0) for name in ("policy", old, "reference"))
    expected = (log_old.exp() * reference_kl(estimator, log_p, log_old, log_r)).sum()
    true = (log_p.exp() * (log_p - log_r)).sum()
    assert (abs(float(expected - true)) < 1e-12) == unbiased


def test_the_unbiased_estimator_is_the_default(logits: dict[str, Tensor]) -> None:
    assert build_objective({"name": "grpo"}).kl_estimator == "k3_weighted"
    far = [x.log_softmax(0) * 200 for x in logits.values()]
    # Where log-probs differ by hundreds of nats the gradient is still rho (lp - reference), to the last digits.
    log_p, log_old, log_r = far[0].requires_grad_(), far[1], far[2]
    reference_kl("k3_weighted", log_p, log_old, log_r).sum().backward()
    expected = (log_p - log_old).exp() * (log_p - log_r)
    torch.testing.assert_close(log_p.grad, expected.detach(), rtol=1e-12, atol=0)
