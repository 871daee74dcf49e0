"""MaxRL, which maximises the log-probability of a right response, and ConSPO, which contrasts right and wrong ones.

S+, S- and |B| are those of disco.py, the token weights of MaxRL those of policy_gradient.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from nemo_disco.algorithms.objectives.base import Objective
from nemo_disco.algorithms.objectives.disco import right_and_wrong, robust_mean, uniform
from nemo_disco.algorithms.objectives.mini_batch import MiniBatch
from nemo_disco.algorithms.objectives.parameters import parameter
from nemo_disco.algorithms.objectives.policy_gradient import ClippedObjective, subtract_mean
from nemo_disco.algorithms.objectives.signals import CompletedSteps, Signal

# A smaller mean reward is rounding; the released code adds this to the mean.
_SMALLEST_MEAN = 1e-6


@dataclass(frozen=True, kw_only=True)
class MaxRL(ClippedObjective):
    """MaxRL: policy gradient with A = (r - mean) / mean, 0 where the group's mean is 0 (arXiv 2602.02710).

    With rewards 0 and 1 and on-policy, the expectation of a group of G is the gradient of the first G - 1 terms of
    log p = -sum_k (1 - p)^k / k, p the policy's probability of a right response; REINFORCE is that of the first.
    Rewards should be 0 or more: a group whose mean is negative has A = 0. Clips and the mean over all tokens are those
    of the released code.
    """

    name: ClassVar[str] = "maxrl"

    def response_weights(self, batch: MiniBatch) -> Tensor:
        centre, sizes = subtract_mean(batch)
        means = batch.groups.table(batch.rewards).sum(1, keepdim=True) / sizes
        advantages = torch.where(means > _SMALLEST_MEAN, centre / means, 0.0)
        return batch.groups.flat(advantages) / max(batch.n_tokens, 1)


@dataclass(frozen=True, kw_only=True)
class ConSPO(Objective):
    """ConSPO: right responses' scores against wrong ones', by InfoNCE with a margin (arXiv 2605.12969, eq. 13).

    J = (1/|B|) sum_q mean_{o in S+} tau log [e(s - m) / (e(s - m) + sum_{S-} e(s'))], e(x) = exp(x / tau), s the token
    mean of lp. The margin m = margin (1 - cos(pi min(k / margin_steps, 1))) / 2 rises over the first steps, k being
    those before the response was sampled. margin_steps is 30% of the run in the paper: the default is that of a run of
    1,000 steps. Questions without both S+ and S- add nothing and count in |B|, as in DisCO; the paper drops them.
    """

    name: ClassVar[str] = "conspo"
    tau: float = parameter(10.0, above=0)
    margin: float = parameter(0.01, at_least=0)
    margin_steps: int = parameter(300, at_least=0, integer=True)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({CompletedSteps.name} if self.margin and self.margin_steps else ())

    def signals(self) -> list[Signal]:
        return [CompletedSteps()] if self.needs else []

    def margins(self, batch: MiniBatch) -> Tensor:
        """[N] each response's m."""
        if not self.needs:
            return torch.full_like(batch.rewards, self.margin)
        progress = (batch[CompletedSteps.name].double() / self.margin_steps).clamp(max=1)
        return self.margin * (1 - (math.pi * progress).cos()) / 2

    def value(self, batch: MiniBatch) -> Tensor:
        right, wrong = right_and_wrong(batch, self.correct(batch))
        scores = batch.groups.table(batch.token_mean(batch.log_probs))
        # tau log sum_{S-} exp(s / tau) [Q]
        count = wrong.sum(1).clamp(min=1).double()
        distractors = robust_mean(wrong, scores, self.tau) + self.tau * count.log()
        leads = scores - batch.groups.table(self.margins(batch)) - distractors[:, None]
        terms = self.tau * logsigmoid(leads / self.tau)
        return (uniform(right) * terms).sum() / len(batch.groups)
