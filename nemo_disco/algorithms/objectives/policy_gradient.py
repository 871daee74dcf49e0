"""Policy gradients with a group's advantages: GRPO and its relatives, GPG, RLOO.

All are separable: J = sum_o w_o sum_t g(lp_t), with w_o the response's advantage divided by the reduction's size.
Advantages come from rewards; an empty response counts in its group's mean and in N, and adds no token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nemo_disco.algorithms.objectives.base import SeparableObjective, Tokens
from nemo_disco.algorithms.objectives.mini_batch import MiniBatch
from nemo_disco.algorithms.objectives.parameters import parameter
from nemo_disco.algorithms.objectives.scores import K3_WEIGHTED, KL_ESTIMATORS, clipped_ratios, reference_kl


def subtract_mean(batch: MiniBatch) -> tuple[Tensor, Tensor]:
    """([Q, G] reward minus the group's mean, 0 in empty places; [Q, 1] the group's size)."""
    present = batch.groups.present
    sizes = present.sum(1, keepdim=True)
    rewards = batch.groups.table(batch.rewards).masked_fill(~present, torch.inf)
    # Subtract the group's minimum first: equal rewards then give exactly 0, not noise that Adam would scale up.
    rewards = (rewards - rewards.amin(1, keepdim=True)).masked_fill(~present, 0.0)
    return (rewards - rewards.sum(1, keepdim=True) / sizes).masked_fill(~present, 0.0), sizes


def standardize(batch: MiniBatch) -> Tensor:
    """[N] (r - mean) / (std + 1e-6) within each group, std unbiased and 0 for a group of one."""
    centre, sizes = subtract_mean(batch)
    std = (centre.square().sum(1, keepdim=True) / (sizes - 1).clamp(min=1)).sqrt()
    return batch.groups.flat(centre / (std + 1e-6))


def centered_by_limit(batch: MiniBatch) -> Tensor:
    """[N] Dr. GRPO's token weights: A / (N C) with A = r - mean, C the maximum response length (arXiv 2503.20783)."""
    return batch.groups.flat(subtract_mean(batch)[0]) / len(batch.lengths) / batch.max_response_length


def per_response_mean(batch: MiniBatch, advantages: Tensor) -> Tensor:
    """[N] the advantages over N |o|: the token weights of the reduction (1/N) sum_o (1/|o|) sum_t."""
    return advantages / len(batch.lengths) / batch.lengths.clamp(min=1)


@dataclass(frozen=True, kw_only=True)
class ClippedObjective(SeparableObjective):
    """PPO's surrogate min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A); A is in `response_weights`."""

    clip_low: float = parameter(0.2, at_least=0, below=1)
    clip_high: float = parameter(0.2, at_least=0)

    def token_values(self, tokens: Tokens) -> Tensor:
        clip = (self.clip_low, self.clip_high)
        return tokens.weights * clipped_ratios(tokens.log_probs, tokens.old_log_probs, tokens.weights, *clip)


@dataclass(frozen=True, kw_only=True)
class GRPO(ClippedObjective):
    """J = (1/N) sum_o (1/|o|) sum_t min(rho A, clip(rho) A), A = (r - mean) / (std + 1e-6) (arXiv 2402.03300).

    kl_coefficient: beta in - beta KL(policy || reference), a token mean; 0 needs no reference; 0.001 in
    arXiv 2505.12366. kl_estimator: a token's term of that KL (scores.reference_kl). The default, k3_weighted, is the
    only one whose gradient stays unbiased after the first mini-batch of a step; k3 is that of GRPO's paper and of the
    published recipes.
    """

    name: ClassVar[str] = "grpo"
    kl_coefficient: float = parameter(0.0, at_least=0)
    kl_estimator: str = parameter(K3_WEIGHTED, choices=KL_ESTIMATORS)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"reference_log_probs"} if self.kl_coefficient else ())

    def response_weights(self, batch: MiniBatch) -> Tensor:
        return per_response_mean(batch, standardize(batch))

    def token_values(self, tokens: Tokens) -> Tensor:
        values = super().token_values(tokens)
        if self.kl_coefficient and tokens.reference_log_probs is not None:
            log_probs = (tokens.log_probs, tokens.old_log_probs, tokens.reference_log_probs)
            values = values - self.kl_coefficient / tokens.total * reference_kl(self.kl_estimator, *log_probs)
        return values


@dataclass(frozen=True, kw_only=True)
class GRPOER(GRPO):
    """GRPO-ER: GRPO + entropy_coefficient x the token mean of the policy's entropy (baseline of arXiv 2505.12366)."""

    name: ClassVar[str] = "grpo_er"
    entropy_coefficient: float = parameter(1e-3, at_least=0)

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | {"entropies"}

    def token_values(self, tokens: Tokens) -> Tensor:
        values = super().token_values(tokens)
        if tokens.entropies is not None:
            values = values + self.entropy_coefficient / tokens.total * tokens.entropies
        return values


@dataclass(frozen=True, kw_only=True)
class GRPORW(GRPO):
    """GRPO_RW: GRPO with its difficulty weight sqrt(p (1 - p)) divided out of A (ablation of arXiv 2505.12366).

    p is the share of the question's responses that are correct; A = 0 where p is 0 or 1.
    """

    name: ClassVar[str] = "grpo_rw"

    def response_weights(self, batch: MiniBatch) -> Tensor:
        correct, present = batch.groups.table(self.correct(batch)), batch.groups.present
        p = correct.sum(1, keepdim=True).double() / present.sum(1, keepdim=True)
        difficulty = batch.groups.flat((p * (1 - p)).sqrt().expand(present.shape))
        weights = super().response_weights(batch)
        return torch.where(difficulty > 0, weights / difficulty, 0.0)


@dataclass(frozen=True, kw_only=True)
class DrGRPO(ClippedObjective):
    """Dr. GRPO: A = r - mean, and the constant divisor C, the maximum response length, for |o| (arXiv 2503.20783)."""

    name: ClassVar[str] = "dr_grpo"

    def response_weights(self, batch: MiniBatch) -> Tensor:
        return centered_by_limit(batch)


@dataclass(frozen=True, kw_only=True)
class DAPO(ClippedObjective):
    """DAPO: GRPO's A, decoupled clips, J = (1/T) sum over all tokens (arXiv 2503.14476).

    Its overlong shaping is a reward term (reward=overlong), its dynamic sampling is algorithm.dynamic_sampling_rounds.
    """

    name: ClassVar[str] = "dapo"
    clip_high: float = parameter(0.28, at_least=0)

    def response_weights(self, batch: MiniBatch) -> Tensor:
        return standardize(batch) / max(batch.n_tokens, 1)


@dataclass(frozen=True, kw_only=True)
class GPG(SeparableObjective):
    """GPG: J = (1/N) sum_o (1/|o|) sum_t lp A, A = alpha (r - mean), no clip, no KL (arXiv 2504.02546).

    alpha = N / (N - number of responses in degenerate groups, those whose rewards are all equal).
    """

    name: ClassVar[str] = "gpg"

    def response_weights(self, batch: MiniBatch) -> Tensor:
        centre = subtract_mean(batch)[0]
        useful = batch.groups.present & centre.any(1, keepdim=True)
        alpha = len(batch.lengths) / useful.sum().clamp(min=1).double()
        return per_response_mean(batch, alpha * batch.groups.flat(centre))

    def token_values(self, tokens: Tokens) -> Tensor:
        return tokens.weights * tokens.log_probs


@dataclass(frozen=True, kw_only=True)
class RLOO(ClippedObjective):
    """RLOO: GRPO's J with A = r - mean of the group's others, 0 for a group of one (arXiv 2402.14740).

    r_i - mean of the others = (r_i - mean) G / (G - 1). The ratio is clipped, as in the length method that uses this
    advantage (arXiv 2502.04463); on the first mini-batch after a rollout it is the plain policy gradient.
    """

    name: ClassVar[str] = "rloo"

    def response_weights(self, batch: MiniBatch) -> Tensor:
        centre, sizes = subtract_mean(batch)
        return per_response_mean(batch, batch.groups.flat(centre * sizes / (sizes - 1).clamp(min=1)))
