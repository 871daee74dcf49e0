"""What keeps the policy near the one that sampled: a penalty on the mini-batch's KL_hat. Pure; one number in, one out.

KL_hat = (1/T) sum over all tokens of the mini-batch of (old - lp), the k1 estimate of KL(old || policy); it may be
negative. It is of the whole mini-batch, never of a micro-batch: evaluated on parts, the hinge fires on their noise.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nemo_disco.algorithms.objectives.parameters import Checked, parameter

SQUARED_HINGE = "squared_hinge"
KL_REGULARIZATION = "kl_regularization"
NONE = "none"

_DEFAULT_BETA = {SQUARED_HINGE: 1e3, KL_REGULARIZATION: 1e-3, NONE: 0.0}


@dataclass(frozen=True, kw_only=True)
class Constraint(Checked):
    """The penalty added to -J (arXiv 2505.12366, Algorithm 1).

    squared_hinge       beta max(KL_hat - delta, 0)^2; beta 1e3, delta 1e-4
    kl_regularization   beta KL_hat, the ablation; beta 1e-3
    none                0

    convention: "paper" is that. "released_code" is the authors' `relu(beta (KL - delta)).detach() * KL`, whose gradient
    is half the paper's; it changes squared_hinge alone. What a kind does not use is left alone, so that an ablation
    changes the kind and nothing else.
    """

    kind: str = parameter(NONE, choices=(SQUARED_HINGE, KL_REGULARIZATION, NONE))
    beta: float | None = parameter(None, at_least=0)
    delta: float = parameter(1e-4, at_least=0)
    convention: str = parameter("paper", choices=("paper", "released_code"))

    def label(self) -> str:
        return "constraint."

    @property
    def linear(self) -> bool:
        """Whether the penalty of a sum is the sum of the penalties, so that no part must be known first."""
        return self.kind != SQUARED_HINGE

    @property
    def strength(self) -> float:
        """beta, or its default for the kind."""
        return _DEFAULT_BETA[self.kind] if self.beta is None else self.beta

    def penalty(self, kl: Tensor) -> Tensor:
        """The penalty of KL_hat, 0-d; where it is linear, also of each token's share of KL_hat, elementwise."""
        if self.kind == NONE:
            return kl * 0.0
        if self.kind == KL_REGULARIZATION:
            return self.strength * kl
        excess = (kl - self.delta).relu()
        if self.convention == "released_code":
            return (self.strength * excess).detach() * kl
        return self.strength * excess**2

    def active(self, kl: float) -> bool:
        """Whether the penalty has a gradient."""
        if self.kind == NONE or self.strength == 0:
            return False
        return self.linear or kl > self.delta


UNCONSTRAINED = Constraint()
HINGED = Constraint(kind=SQUARED_HINGE)
