"""Off-policy correction, for rollouts from an engine that rounds differently or has older weights.

Reads old_log_probs (the trainer's) and generation_log_probs (the rollout engine's) only. It scales the gradient of J
with respect to each token's log-prob; the value of J, the constraint and the entropies are unchanged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nemo_disco.algorithms.objectives.mini_batch import MiniBatch
from nemo_disco.algorithms.objectives.parameters import ParameterSet, parameter

NONE = "none"
TRUNCATED_IS = "truncated_importance_sampling"
SEQUENCE_MASK = "sequence_mask"

_DEFAULT_CAP = {NONE: math.inf, TRUNCATED_IS: 2.0, SEQUENCE_MASK: 1.01}


@dataclass(frozen=True, kw_only=True)
class OffPolicy(ParameterSet):
    """Factors c_t of the gradient of J at token t, constants computed from delta_t = old_t - generation_t.

    truncated_importance_sampling   c_t = min(exp(delta_t), cap), cap 2 (as IMPALA's rho, arXiv 1802.01561)
    sequence_mask                   c_t = 1 where 1/cap <= exp(mean delta over the response) <= cap, else 0; cap 1.01
    none                            c_t = 1

    sequence_mask uses the geometric mean of a response's ratios, so that a long response is not masked for its length.
    A masked response adds no gradient and still counts in every mean.
    """

    kind: str = parameter(NONE, choices=(NONE, TRUNCATED_IS, SEQUENCE_MASK))
    cap: float | None = parameter(None, above=0)

    def label(self) -> str:
        return "off_policy."

    @property
    def needs(self) -> frozenset[str]:
        """The optional fields of MiniBatch that the factors read."""
        return frozenset() if self.kind == NONE else frozenset({"generation_log_probs"})

    @property
    def limit(self) -> float:
        """cap; if None, the default of the kind."""
        return _DEFAULT_CAP[self.kind] if self.cap is None else self.cap

    def factors(self, batch: MiniBatch) -> Tensor:
        """c [T], float64; ones if there is no correction."""
        if self.kind == NONE or batch.generation_log_probs is None:
            return torch.ones_like(batch.old_log_probs)
        log_ratios = batch.old_log_probs - batch.generation_log_probs
        if self.kind == TRUNCATED_IS:
            return log_ratios.exp().clamp(max=self.limit)
        return batch.spread((batch.token_mean(log_ratios).abs() <= abs(math.log(self.limit))).double())

    def apply(self, batch: MiniBatch) -> MiniBatch:
        """The batch with the same log-probs, whose gradients are scaled by c in backward."""
        if self.kind == NONE:
            return batch
        return replace(batch, log_probs=scale_gradient(batch.log_probs, self.factors(batch)))

    def metrics(self, batch: MiniBatch) -> dict[str, float]:
        """The mean factor, and the share of tokens that are capped or masked; empty without a correction."""
        if self.kind == NONE or not batch.n_tokens:
            return {}
        factors = self.factors(batch)
        is_cut = factors == (self.limit if self.kind == TRUNCATED_IS else 0)
        return {"off_policy/factor_mean": float(factors.mean()), "off_policy/cut": float(is_cut.double().mean())}


def scale_gradient(log_probs: Tensor, factors: Tensor) -> Tensor:
    """log_probs unchanged in forward; in backward their gradient is multiplied by the factors."""
    fixed = log_probs.detach()
    return fixed + factors * (log_probs - fixed)


UNCORRECTED = OffPolicy()
