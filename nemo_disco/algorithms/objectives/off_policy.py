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
from nemo_disco.runtime.errors import UserError

NONE = "none"
TRUNCATED_IS = "truncated_importance_sampling"
SEQUENCE_IS = "sequence_importance_sampling"
ICEPOP = "icepop"
SEQUENCE_MASK = "sequence_mask"
OUTLIER_MASK = "outlier_mask"

_DEFAULT_CAP = {
    NONE: math.inf,
    TRUNCATED_IS: 2.0,
    SEQUENCE_IS: 2.0,
    ICEPOP: 5.0,
    SEQUENCE_MASK: 1.01,
    OUTLIER_MASK: 100.0,
}
_DEFAULT_FLOOR = {ICEPOP: 0.5, OUTLIER_MASK: 1e-4}


@dataclass(frozen=True, kw_only=True)
class OffPolicy(ParameterSet):
    """Factors c_t of the gradient of J at token t, constants computed from the ratio r_t = exp(old_t - generation_t).

    truncated_importance_sampling   c_t = min(r_t, cap), cap 2 (as IMPALA's rho, arXiv 1802.01561)
    sequence_importance_sampling    c_t = min(product of the response's r, cap), cap 2 (richardli.xyz/rl-collapse)
    icepop                          c_t = r_t where floor <= r_t <= cap, else 0; floor 0.5, cap 5 (arXiv 2510.18855)
    sequence_mask                   c_t = 1 where the geometric mean of the response's r is in [1/cap, cap], else 0;
                                    cap 1.01
    outlier_mask                    c_t = 1 where every r of the response is in [floor, cap], else 0; floor 1e-4,
                                    cap 100
    none                            c_t = 1

    The product is the weight of the whole response: without a cap it removes the bias, which factors of single tokens
    do not, at a variance that grows with the length. sequence_mask takes the geometric mean, so that a long response is
    not masked for its length. outlier_mask is verl's veto (its floor) and prime-rl's sequence mask (its cap). A masked
    response adds no gradient and still counts in every mean.
    """

    kind: str = parameter(NONE, choices=tuple(_DEFAULT_CAP))
    cap: float | None = parameter(None, above=0)
    floor: float | None = parameter(None, at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.floor is not None and self.kind not in (NONE, *_DEFAULT_FLOOR):
            raise UserError(
                f"{self.label()}floor is a limit of {' and '.join(_DEFAULT_FLOOR)}; off_policy.kind is {self.kind}"
            )
        if self.lowest >= self.limit:
            raise UserError(f"{self.label()}floor must be below cap; they are {self.lowest:g} and {self.limit:g}")

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

    @property
    def lowest(self) -> float:
        """floor; if None, the default of the kind, 0 where it has none."""
        return _DEFAULT_FLOOR.get(self.kind, 0.0) if self.floor is None else self.floor

    def factors(self, batch: MiniBatch) -> Tensor:
        """c [T], float64; ones if there is no correction.

        Raises UserError, naming the token, if an engine's log-prob is not finite.
        """
        if self.kind == NONE:
            return torch.ones_like(batch.old_log_probs)
        log_ratios = self._log_ratios(batch)
        ratios, means = log_ratios.exp(), batch.token_mean(log_ratios)
        inside = (ratios >= self.lowest) & (ratios <= self.limit)
        if self.kind == TRUNCATED_IS:
            return ratios.clamp(max=self.limit)
        if self.kind == SEQUENCE_IS:
            return batch.spread((means * batch.lengths).exp().clamp(max=self.limit))
        if self.kind == ICEPOP:
            return torch.where(inside, ratios, 0.0)
        if self.kind == SEQUENCE_MASK:
            return batch.spread((means.abs() <= abs(math.log(self.limit))).double())
        return batch.spread((batch.token_mean((~inside).double()) == 0).double())

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
        is_cut = factors == (self.limit if self.kind in (TRUNCATED_IS, SEQUENCE_IS) else 0)
        return {"off_policy/factor_mean": float(factors.mean()), "off_policy/cut": float(is_cut.double().mean())}

    def _log_ratios(self, batch: MiniBatch) -> Tensor:
        """old - generation [T]."""
        generation = batch["generation_log_probs"]
        bad = (~generation.isfinite()).nonzero()
        if len(bad):
            t = int(bad[0])
            raise UserError(
                f"algorithm.off_policy.kind={self.kind} needs finite log-probs of the rollout engine, and that of "
                f"{batch.describe_token(t)} is {float(generation[t])}; an engine that filters tokens reports -inf: "
                "set generation.top_p=1.0 and generation.top_k=0, or algorithm.off_policy.kind=none"
            )
        return batch.old_log_probs - generation


def scale_gradient(log_probs: Tensor, factors: Tensor) -> Tensor:
    """log_probs unchanged in forward; in backward their gradient is multiplied by the factors."""
    fixed = log_probs.detach()
    return fixed + factors * (log_probs - fixed)


UNCORRECTED = OffPolicy()
