"""The difference between the log-probs that rollout engine and trainer give the same tokens: its size, the worst tokens
and a likely cause. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_disco.algorithms.objectives.constraint import SQUARED_HINGE, Constraint
from nemo_disco.data.rollouts import Rollouts

# A warning is given where the noise floor is above this share of delta.
NOISE_SHARE = 0.3


def mismatch(old_log_probs: Tensor, generation_log_probs: Tensor) -> dict[str, float]:
    """Size of delta = old - generation, [T] each, and two estimates of KL(rollout engine || trainer), nats a token.

    The rollout engine sampled the tokens: k1 = mean(-delta) may be negative, k3 = mean(exp(delta) - 1 - delta) may not.
    Without tokens the values are those of equal log-probs.
    """
    delta = old_log_probs.cpu().double() - generation_log_probs.cpu().double()
    if not len(delta):
        delta = torch.zeros(1, dtype=torch.float64)
    return {
        "mismatch/mean_abs": float(delta.abs().mean()),
        "mismatch/max_abs": float(delta.abs().max()),
        "mismatch/mean_exp_abs": float(delta.abs().exp().mean()),
        "mismatch/kl_k1": float(-delta.mean()),
        "mismatch/kl_k3": float((delta.expm1() - delta).mean()),
    }


@dataclass(frozen=True)
class MismatchedToken:
    """A response token on which trainer and engine differ: response index, place in it, token id, both log-probs."""

    response: int
    place: int
    token: int
    trainer: float
    engine: float


def worst_tokens(old_log_probs: Tensor, rollouts: Rollouts, count: int = 5) -> list[MismatchedToken]:
    """The `count` tokens that differ most, worst first."""
    delta = (old_log_probs.cpu().double() - rollouts.generation_log_probs.double()).abs()
    worst = delta.topk(min(count, len(delta))).indices.tolist()
    return tokens_at(old_log_probs, rollouts, worst)


def tokens_at(old_log_probs: Tensor, rollouts: Rollouts, indices: Sequence[int]) -> list[MismatchedToken]:
    """The tokens at `indices` of the packed T response tokens."""
    responses, places = (values[list(indices)].tolist() for values in _places(rollouts))
    tokens = [int(rollouts.response(r)[place]) for r, place in zip(responses, places, strict=True)]
    log_probs = (values[list(indices)].tolist() for values in (old_log_probs, rollouts.generation_log_probs))
    return [MismatchedToken(*values) for values in zip(responses, places, tokens, *log_probs, strict=True)]


def likely_cause(
    old_log_probs: Tensor,
    rollouts: Rollouts,
    *,
    plain_log_probs: Tensor,
    dtype: torch.dtype,
    setting: str = "trainer.precision",
    quantization: str | None = None,
) -> str:
    """A guess at the setting that causes the difference, from how it is spread over the tokens.

    plain_log_probs [T]: the trainer's at temperature 1. dtype: of its weights; setting: the key that decided it;
    quantization: generation.quantization.
    """
    engine = rollouts.generation_log_probs.double()
    delta = (old_log_probs.cpu().double() - engine).abs()
    if float((plain_log_probs.cpu().double() - engine).abs().mean()) < 0.1 * float(delta.mean()):
        return "the engine's log-probs ignore the temperature (its log-probs mode), they are those of temperature 1"
    _, place = _places(rollouts)
    early, late = (delta[place <= place.double().quantile(0.25)], delta[place >= place.double().quantile(0.75)])
    if float(late.mean()) > 4 * float(early.mean()):
        return "it grows along the response: rope (fused rope, its scaling or base), or a KV cache of lower precision"
    small = float(delta.mean()) < 0.1
    if quantization is not None and small:
        return (
            f"generation.quantization={quantization}: the engine samples from rounded weights; algorithm.off_policy "
            "corrects for that, then raise verify.max_kl and verify.max_mismatch"
        )
    tokens = torch.cat([rollouts.response(i) for i in range(len(rollouts))])
    shares = torch.zeros(int(tokens.max()) + 1, dtype=torch.float64).index_add(0, tokens, delta)
    top = shares.topk(min(3, len(shares)))
    if float(top.values.sum()) > 0.5 * float(shares.sum()) and bool(
        torch.isin(tokens, top.indices).double().mean() < 0.2
    ):
        return f"it sits on tokens {top.indices.tolist()}: the output layer (tied embeddings, padded vocabulary)"
    if small:
        hint = f"try {in_float32(setting)}" if dtype is torch.bfloat16 else "is the engine in bfloat16, or quantised?"
        return f"small and everywhere: precision ({hint})"
    return "large and everywhere: other weights than the trainer's, or another network (bias-activation fusion, norms)"


def in_float32(setting: str) -> str:
    """The override that makes verify.dtype or trainer.precision float32."""
    return f"{setting}={'float32' if setting == 'verify.dtype' else '32'}"


def noise_warning(noise: float, constraint: Constraint) -> str:
    """A warning if the constraint would act on rounding errors, else "". noise: |KL_hat| at theta = theta_old."""
    if constraint.kind != SQUARED_HINGE or not noise > NOISE_SHARE * constraint.delta:
        return ""
    return (
        f"the noise floor, {noise:.2e}, is above {NOISE_SHARE} of delta ({constraint.delta:g}): the constraint would "
        "act on rounding; raise algorithm.constraint.delta, or trainer.precision=32"
    )


def _places(rollouts: Rollouts) -> tuple[Tensor, Tensor]:
    """For each of the T response tokens: the index of its response, and its place there."""
    lengths = rollouts.response_lengths
    response = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    return response, torch.arange(int(lengths.sum())) - rollouts.response_offsets[response]
