"""Tokens are sampled from the documented distribution, with a random stream for each request."""

from __future__ import annotations

import pytest
import torch

from nemo_disco.generation.engine import SamplingParams
from nemo_disco.generation.megatron.token_sampling import sample, uniforms

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -3.0])


def frequencies(sampling: SamplingParams, draws: int = 40_000) -> torch.Tensor:
    """The share of each of the 5 tokens in many samples from LOGITS."""
    uniform = uniforms(torch.arange(draws), 0)
    tokens, _ = sample(LOGITS.expand(draws, -1), sampling, uniform)
    return torch.bincount(tokens, minlength=5) / draws


@pytest.mark.parametrize("temperature", [0.6, 1.0, 2.0])
def test_frequencies_are_the_softmax(temperature: float) -> None:
    expected = (LOGITS / temperature).softmax(-1)
    assert (frequencies(SamplingParams(temperature, 1)) - expected).abs().max() < 0.01


def test_top_k_keeps_the_k_likeliest() -> None:
    expected = torch.tensor([*LOGITS[:2].softmax(-1).tolist(), 0.0, 0.0, 0.0])
    assert (frequencies(SamplingParams(1.0, 1, top_k=2)) - expected).abs().max() < 0.01


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    probs = LOGITS.softmax(-1)  # .64 .24 .09 .03 .004
    actual = frequencies(SamplingParams(1.0, 1, top_p=0.7))
    expected = torch.where(torch.arange(5) < 2, probs, 0.0) / probs[:2].sum()
    assert (actual - expected).abs().max() < 0.01


def test_greedy_takes_the_likeliest_with_its_plain_log_prob() -> None:
    tokens, log_probs = sample(LOGITS[None], SamplingParams(0.0, 1), uniforms(torch.tensor([7]), 0))
    assert tokens.tolist() == [0]
    torch.testing.assert_close(log_probs, LOGITS.log_softmax(-1)[:1])


def test_log_prob_is_of_the_whole_distribution_over_the_temperature() -> None:
    tokens, log_probs = sample(LOGITS[None], SamplingParams(0.5, 1, top_p=0.5, top_k=1), torch.tensor([0.3]).double())
    torch.testing.assert_close(log_probs, (LOGITS / 0.5).log_softmax(-1)[tokens])


def test_uniforms_are_uniform_and_independent() -> None:
    by_position = torch.stack([uniforms(torch.arange(2000), t) for t in range(20)])
    assert 0.0 <= float(by_position.min()) < float(by_position.max()) < 1.0
    assert abs(float(by_position.mean()) - 0.5) < 0.005
    correlation = torch.corrcoef(by_position)
    assert float((correlation - torch.eye(20)).abs().max()) < 0.1
    assert by_position.unique().numel() == by_position.numel()


def test_uniforms_take_any_seed_and_position() -> None:
    seeds = torch.tensor([0, 2**63 - 1, -(2**63)])
    assert bool(((uniforms(seeds, 100_000) >= 0) & (uniforms(seeds, 100_000) < 1)).all())


def test_a_position_may_be_a_tensor() -> None:
    seeds = torch.tensor([0, 1, 2**62, -5])
    for position in (0, 1, 8191):
        assert torch.equal(uniforms(seeds, position), uniforms(seeds, torch.tensor([position])))
