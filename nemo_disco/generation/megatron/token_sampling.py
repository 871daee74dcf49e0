"""Sampling of tokens from logits: temperature, top-k, top-p, and a random stream for each request.

The random number of a draw is a function of (seed, position) alone, so a request samples the same response in any
batch, on any rank, on any device. Pure functions of tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_disco.generation.engine import SamplingParams


def _mix(x: Tensor) -> Tensor:
    """Apply SplitMix64's finaliser (Steele, Lea and Flood, OOPSLA 2014) to int64, whose products wrap like uint64's."""
    x = (x ^ _shift(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shift(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift right, filling with zeros (torch's shift repeats the sign)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def uniforms(seeds: Tensor, position: int | Tensor) -> Tensor:
    """Random numbers [B] in float64, uniform in [0, 1), for the draw of each request's token at a position.

    seeds [B] int64. position: an int, or an int64 tensor [1].
    """
    if isinstance(position, Tensor):
        step: int | Tensor = (position + 1) * (0x9E3779B97F4A7C15 - 2**64)
    else:
        step = ((position + 1) * 0x9E3779B97F4A7C15 + 2**63) % 2**64 - 2**63
    bits = _mix(_mix(seeds) + step)  # as int64
    return _shift(bits, 11).double() * 2.0**-53


def sample(logits: Tensor, sampling: SamplingParams, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Sample tokens [B] int64 and return them with their log-probs [B]. logits [B, V]: float32 or float64; uniform [B].

    The log-prob is that of the whole distribution on logits / temperature, before top-k and top-p. Temperature 0
    picks the likeliest token, with its log-prob on the plain logits.
    """
    greedy = sampling.temperature == 0.0
    log_probs = (logits if greedy else logits / sampling.temperature).log_softmax(-1)
    if greedy:
        tokens = log_probs.argmax(-1)
    else:
        probs = _filter(log_probs.exp(), sampling)
        # float64: at a vocabulary of 152k a float32 running sum loses the tail.
        cumulative = probs.cumsum(-1, dtype=torch.float64)
        threshold = (uniform * cumulative[:, -1])[:, None]
        tokens = torch.searchsorted(cumulative, threshold, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
    return tokens, log_probs.gather(-1, tokens[:, None])[:, 0]


def _filter(probs: Tensor, sampling: SamplingParams) -> Tensor:
    """Set the tokens outside top-k, then outside top-p, to 0; the rest is not renormalised. Ties at top-k are kept."""
    if 0 < sampling.top_k < probs.shape[-1]:
        edge = probs.topk(sampling.top_k, dim=-1).values[:, -1:]
        probs = probs.masked_fill(probs < edge, 0.0)
    if sampling.top_p < 1.0:
        ordered, order = probs.sort(dim=-1, descending=True)
        mass = ordered.double()
        before = mass.cumsum(-1) - mass
        ordered = ordered.masked_fill(before >= sampling.top_p * mass.sum(-1, keepdim=True), 0.0)
        probs = torch.zeros_like(probs).scatter(-1, order, ordered)
    return probs
