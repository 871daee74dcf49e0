"""The likeliest tokens of a policy and the KL over them, against all logits in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nemo_disco.policy import likely_tokens as module
from nemo_disco.policy.likely_tokens import LikelyTokens, find_likely_tokens, token_divergences

VOCABULARY = 50


def make_head(rows: int = 60) -> tuple[Tensor, Tensor]:
    """Hidden states [23, 6] and an output weight [rows, 6], of which VOCABULARY rows are tokens."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(23, 6, generator=generator, dtype=torch.float64)
    return hidden, torch.randn(rows, 6, generator=generator, dtype=torch.float64)


def distributions(spread: float = 0.2) -> tuple[Tensor, Tensor]:
    """Log-probs [23, VOCABULARY] of an old policy and of one near it, the latter differentiable."""
    hidden, weight = make_head()
    logits = hidden @ weight[:VOCABULARY].T
    generator = torch.Generator().manual_seed(4)
    moved = logits + spread * torch.randn(logits.shape, generator=generator, dtype=torch.float64)
    return logits.log_softmax(1), moved.requires_grad_().log_softmax(1)


def likeliest(old: Tensor, count: int) -> LikelyTokens:
    values, ids = old.topk(count, 1)
    return LikelyTokens(ids.to(torch.int32), values, count == old.size(1))


@pytest.mark.parametrize("count", [1, 7, VOCABULARY])
def test_likely_tokens_are_those_of_all_logits(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tile by tile, with tiles smaller than count; padding rows are no tokens, however large their logits."""
    monkeypatch.setattr(module, "_TILE", 8)
    monkeypatch.setattr(module, "_ROWS", 10)
    hidden, weight = make_head()
    weight[VOCABULARY:] *= 100
    ids = find_likely_tokens(hidden, weight, count, vocab_size=VOCABULARY)
    assert torch.equal(ids, (hidden @ weight[:VOCABULARY].T).topk(count, 1).indices)
    assert find_likely_tokens(hidden[:0], weight, count, vocab_size=VOCABULARY).shape == (0, count)


@pytest.mark.parametrize("count", [0, VOCABULARY + 1])
def test_a_number_of_tokens_that_the_vocabulary_does_not_have_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"{count} likely tokens were asked for, of a vocabulary of {VOCABULARY}"):
        find_likely_tokens(*make_head(), count, vocab_size=VOCABULARY)


def test_the_divergence_grows_to_the_exact_kl() -> None:
    """It never decreases as tokens leave the bucket of the others (data processing), and is exact with all of them."""
    old, new = distributions()
    exact = (old.exp() * (old - new)).sum(1)
    previous = torch.zeros(len(old), dtype=torch.float64)
    for count in (1, 3, 16, VOCABULARY - 1, VOCABULARY):
        likely = likeliest(old, count)
        divergence = token_divergences(new.gather(1, likely.ids.long()), likely)
        q, p = (
            torch.cat([x, 1 - x.sum(1, keepdim=True)], 1)
            for x in (likely.log_probs.exp(), new.exp().gather(1, likely.ids.long()))
        )
        if count < VOCABULARY:
            torch.testing.assert_close(divergence, (q * (q / p).log()).sum(1), rtol=1e-9, atol=1e-12)
        assert bool((divergence >= previous - 1e-12).all() and (divergence <= exact + 1e-12).all())
        previous = divergence.detach()
    torch.testing.assert_close(previous, exact.detach(), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("count", [1, 5, VOCABULARY])
def test_the_gradient_by_the_logits_is_that_of_the_definition(count: int) -> None:
    """p_v - q_v for a compared token, p_v (1 - q / p of the bucket) for another; 0 at the old policy itself."""
    old, new = distributions()
    likely, ids = likeliest(old, count), old.topk(count, 1).indices
    logits = new.detach().requires_grad_()  # log-probs are logits too
    (gradient,) = torch.autograd.grad(token_divergences(logits.log_softmax(1).gather(1, ids), likely).sum(), logits)
    q, p = old.exp(), new.detach().exp()
    others = (1 - q.gather(1, ids).sum(1)) / (1 - p.gather(1, ids).sum(1))
    expected = (p * (1 - others[:, None])).scatter(1, ids, (p - q).gather(1, ids))
    torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-12)
    logits = old.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(token_divergences(logits.log_softmax(1).gather(1, ids), likely).sum(), logits)
    assert float(gradient.abs().max()) < 1e-12


def test_no_probability_left_for_the_others_is_no_infinity() -> None:
    """In float32 the compared tokens' probabilities add up to 1, or to a little more."""
    old = torch.tensor([[20.0, 0.0, -1.0, -2.0], [90.0, 0.0, 0.0, 0.0]]).log_softmax(1)
    for spread in (0.0, 3.0, 30.0):
        logits = (old + spread * torch.tensor([0.0, 1.0, 2.0, -1.0])).requires_grad_()
        likely = likeliest(old, 2)
        divergence = token_divergences(logits.log_softmax(1).gather(1, likely.ids.long()), likely)
        (gradient,) = torch.autograd.grad(divergence.sum(), logits)
        assert bool(divergence.isfinite().all() and gradient.isfinite().all())
        assert spread or float(divergence.abs().max()) < 1e-6
