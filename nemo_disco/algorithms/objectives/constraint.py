"""The KL constraint: a penalty on KL_hat that keeps the policy near the one that sampled the responses.

KL_hat = (1/T) sum over all T tokens of the mini-batch of (old - lp), the k1 estimate of KL(old || policy); it may be
negative. Always over the whole mini-batch: on a micro-batch, noise alone would exceed the hinge's threshold.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nemo_disco.algorithms.objectives.parameters import ParameterSet, parameter

SQUARED_HINGE = "squared_hinge"
KL_REGULARIZATION = "kl_regularization"
NONE = "none"

_DEFAULT_BETA = {SQUARED_HINGE: 1e3, KL_REGULARIZATION: 1e-3, NONE: 0.0}


@dataclass(frozen=True, kw_only=True)
class Constraint(ParameterSet):
    """The penalty added to -J (arXiv 2505.12366, Algorithm 1).

    squared_hinge       beta max(KL_hat - delta, 0)^2; beta 1e3, delta 1e-4
    kl_regularization   beta KL_hat, the ablation; beta 1e-3
    none                0

    convention: "paper" is the above. "released_code" is the authors' `relu(beta (KL - delta)).detach() * KL`, whose
    gradient is half the paper's; it affects squared_hinge only. Parameters that a kind does not use are accepted, so
    that an ablation changes `kind` and nothing else.
    """

    kind: str = parameter(NONE, choices=(SQUARED_HINGE, KL_REGULARIZATION, NONE))
    beta: float | None = parameter(None, at_least=0)
    delta: float = parameter(1e-4, at_least=0)
    convention: str = parameter("paper", choices=("paper", "released_code"))

    def label(self) -> str:
        return "constraint."

    @property
    def linear(self) -> bool:
        """True if the penalty is linear in KL_hat, so that it is a sum over tokens and needs no first pass."""
        return self.kind != SQUARED_HINGE

    @property
    def strength(self) -> float:
        """beta; if None, the default of the kind."""
        return _DEFAULT_BETA[self.kind] if self.beta is None else self.beta

    def penalty(self, kl: Tensor) -> Tensor:
        """The penalty of KL_hat, 0-d. If `linear`, also elementwise: the penalties of the tokens' shares of KL_hat."""
        if self.kind == NONE:
            return kl * 0.0
        if self.kind == KL_REGULARIZATION:
            return self.strength * kl
        excess = (kl - self.delta).relu()
        if self.convention == "released_code":
            return (self.strength * excess).detach() * kl
        return self.strength * excess**2

    def active(self, kl: float) -> bool:
        """True if the penalty has a gradient at this KL_hat."""
        if self.kind == NONE or self.strength == 0:
            return False
        return self.linear or kl > self.delta


UNCONSTRAINED = Constraint()
HINGED = Constraint(kind=SQUARED_HINGE)
