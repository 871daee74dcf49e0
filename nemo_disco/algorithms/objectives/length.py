"""Methods for shorter reasoning: GRPO or RLOO on rewards with a length term (GRPO-LEAD also reweights advantages).

The length term is added to the reward, which gives the paper's formula where the reward is the verdict, 0 or 1. A
question's statistics are over its responses in the mini-batch, which are all; HAPO's h comes from earlier steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from nemo_disco.algorithms.objectives.mini_batch import MiniBatch
from nemo_disco.algorithms.objectives.parameters import parameter
from nemo_disco.algorithms.objectives.policy_gradient import GRPO, RLOO
from nemo_disco.algorithms.objectives.signals import RewardedResponses, Signal


def relative_lengths(batch: MiniBatch, right: Tensor) -> Tensor:
    """[N] z = (|o| - mu) / (std + 1e-7), mu and std over the question's right responses; 0 for a wrong one.

    std is unbiased, and 0 for a single right response.
    """
    members, lengths = batch.groups.table(right), batch.groups.table(batch.lengths.double())
    count = members.sum(1, keepdim=True)
    centre = (lengths - (lengths * members).sum(1, keepdim=True) / count.clamp(min=1)) * members
    std = (centre.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    return batch.groups.flat(centre / (std + 1e-7))


def pass_rates(batch: MiniBatch, right: Tensor) -> tuple[Tensor, Tensor]:
    """([N] p, the share of right responses of the response's question; [N] K, its number of responses)."""
    members, present = batch.groups.table(right), batch.groups.present
    size = present.sum(1, keepdim=True).double()
    p = members.sum(1, keepdim=True) / size
    return batch.groups.flat(p.expand(present.shape)), batch.groups.flat(size.expand(present.shape))


@dataclass(frozen=True, kw_only=True)
class RLOOLP(RLOO):
    """RLOO-LP: RLOO on r = 1[right] (1 - alpha sigmoid(z)), z the relative length (arXiv 2502.04463)."""

    name: ClassVar[str] = "rloo_lp"
    alpha: float = parameter(0.2, at_least=0)

    def shaped(self, batch: MiniBatch) -> Tensor:
        right = self.correct(batch)
        return batch.rewards - torch.where(right, self.alpha * relative_lengths(batch, right).sigmoid(), 0.0)


@dataclass(frozen=True, kw_only=True)
class ALP(GRPO):
    """ALP: GRPO on r = 1[right] - beta |o| max(p, 1/K), a larger penalty on easy questions (arXiv 2506.05256).

    p: the question's pass rate over its K responses. beta is per token: 1e-9 to 1e-7 for thousands of tokens.
    """

    name: ClassVar[str] = "alp"
    beta: float = parameter(1e-7, at_least=0)

    def shaped(self, batch: MiniBatch) -> Tensor:
        p, size = pass_rates(batch, self.correct(batch))
        return batch.rewards - self.beta * batch.lengths.double() * torch.maximum(p, 1 / size)


class ShortestCorrect(Signal):
    """HAPO's h: tokens of the question's shortest right response in earlier steps, 0 if there is none."""

    name: ClassVar[str] = "shortest_correct"

    def __init__(self) -> None:
        self._shortest: dict[int, int] = {}

    def annotate(self, responses: RewardedResponses) -> Tensor:
        ids = responses.question_ids.tolist()
        column = torch.tensor([self._shortest.get(i, 0) for i in ids], dtype=torch.int64)
        for i, length, correct in zip(
            ids, responses.response_lengths.tolist(), responses.correct.tolist(), strict=True
        ):
            if correct and length:
                self._shortest[i] = min(length, self._shortest.get(i, length))
        return column

    def state_dict(self) -> dict[str, Any]:
        return {str(i): length for i, length in self._shortest.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._shortest = {int(i): length for i, length in state.items()}


@dataclass(frozen=True, kw_only=True)
class HAPO(GRPO):
    """HAPO: GRPO on r = 1 + w max(f, -0.7) for a right response, w min(f, 0) for a wrong one (arXiv 2505.11225).

    f = cos(min(pi |o| / (2 h), pi)), h the shortest right response to the question in earlier steps
    (`shortest_correct`); no length term while there is none. w: length_weight.
    """

    name: ClassVar[str] = "hapo"
    length_weight: float = parameter(0.1, at_least=0)

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | {ShortestCorrect.name}

    def signals(self) -> list[Signal]:
        return [ShortestCorrect()]

    def shaped(self, batch: MiniBatch) -> Tensor:
        h = batch[ShortestCorrect.name].double()
        f = (math.pi * batch.lengths.double() / (2 * h.clamp(min=1))).clamp(max=math.pi).cos()
        term = torch.where(self.correct(batch), f.clamp(min=-0.7), f.clamp(max=0))
        return batch.rewards + self.length_weight * torch.where(h > 0, term, 0.0)


@dataclass(frozen=True, kw_only=True)
class GRPOLEAD(GRPO):
    """GRPO-LEAD: r = exp(-alpha z) for a right response, z the relative length, else -1 (arXiv 2504.09696).

    Then GRPO's A, times w(p) where it is positive and w(1 - p) where it is negative: w(p) = weight_low +
    (weight_high - weight_low) / (1 + exp(slope (p - midpoint))), p the pass rate: hard questions weigh more.
    """

    name: ClassVar[str] = "grpo_lead"
    alpha: float = parameter(0.05, at_least=0)
    weight_low: float = parameter(0.4, at_least=0)
    weight_high: float = parameter(1.5, at_least=0)
    midpoint: float = parameter(0.75)
    slope: float = parameter(10.0, at_least=0)

    def shaped(self, batch: MiniBatch) -> Tensor:
        right = self.correct(batch)
        z = relative_lengths(batch, right)
        return batch.rewards + torch.where(right, (-self.alpha * z).expm1(), -1.0)

    def response_weights(self, batch: MiniBatch) -> Tensor:
        weights, p = super().response_weights(batch), pass_rates(batch, self.correct(batch))[0]
        difficulty = (self.slope * (self.midpoint - torch.where(weights > 0, p, 1 - p))).sigmoid()
        return weights * (self.weight_low + (self.weight_high - self.weight_low) * difficulty)
