"""The KL constraint: a penalty on KL_hat, which keeps the policy near the one that sampled the responses.

KL_hat estimates KL(old || policy) in nats a token: the mean of one term per response token, always over the whole
mini-batch; on a micro-batch, noise alone would exceed the hinge's threshold.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor

from nemo_disco.algorithms.objectives.parameters import ParameterSet, parameter
from nemo_disco.algorithms.objectives.scores import k3
from nemo_disco.runtime.errors import UserError

SQUARED_HINGE = "squared_hinge"
KL_REGULARIZATION = "kl_regularization"
DUAL = "dual"
NONE = "none"

K1 = "k1"
K3 = "k3"
TOP_K = "top_k"

_DEFAULT_BETA = {SQUARED_HINGE: 1e3, KL_REGULARIZATION: 1e-3, DUAL: 1.0, NONE: 0.0}


@dataclass(frozen=True, kw_only=True)
class Constraint(ParameterSet):
    """The penalty added to -J, and the estimator of the KL in it.

    squared_hinge       beta max(KL_hat - delta, 0)^2; beta 1e3, delta 1e-4 (arXiv 2505.12366, Algorithm 1)
    kl_regularization   beta KL_hat, the paper's ablation; beta 1e-3
    dual                beta KL_hat, where beta is the multiplier of KL <= delta: after each step it grows if the KL is
                        above delta and shrinks if it is below (`ascend`), within [beta_min, beta_max]; it starts at 1
    none                0

    The term of a token in KL_hat, all unbiased on old's samples; d = lp - old:
    k1      -d, the paper's. Near old it is noise: its standard error is std(d) / sqrt(T) where the KL is mean(d^2) / 2,
            and its gradient, the mean of -grad lp, has expectation 0 at old
    k3      exp(d) - 1 - d, never negative; gradient (exp(d) - 1) grad lp, whose noise vanishes at old
    top_k   the exact KL over old's `top_k` likeliest tokens at this place and one bucket of all others: at most the
            true KL, and equal to it if top_k is the vocabulary's size. Needs the mini-batch's `divergences`

    convention: "paper" is the above. "released_code" is the authors' `relu(beta (KL - delta)).detach() * KL`, whose
    gradient is half the paper's; it affects squared_hinge only. Parameters that a kind does not use are accepted, so
    that an ablation changes `kind` and nothing else.
    """

    kind: str = parameter(NONE, choices=(SQUARED_HINGE, KL_REGULARIZATION, DUAL, NONE))
    beta: float | None = parameter(None, at_least=0)
    delta: float = parameter(1e-4, at_least=0)
    convention: str = parameter("paper", choices=("paper", "released_code"))
    estimator: str = parameter(K3, choices=(K1, K3, TOP_K))
    top_k: int = parameter(16, at_least=1, integer=True)
    beta_min: float | None = parameter(None, above=0)
    beta_max: float | None = parameter(None, above=0)
    rate: float = parameter(0.1, above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind != DUAL:
            return
        if self.beta_min is None or self.beta_max is None:
            missing = "beta_min" if self.beta_min is None else "beta_max"
            raise UserError(
                f"constraint.{missing} is missing: constraint.kind=dual changes beta within [beta_min, beta_max], "
                "for example constraint.beta_min=0.01 constraint.beta_max=100"
            )
        if not self.beta_min <= self.strength <= self.beta_max:
            raise UserError(
                f"constraint.beta={self.strength:g}, with which dual starts, must be within [beta_min, beta_max], "
                f"which is [{self.beta_min:g}, {self.beta_max:g}]"
            )
        if self.delta == 0:
            raise UserError("constraint.delta must be above 0 for constraint.kind=dual, which compares KL with delta")

    def label(self) -> str:
        return "constraint."

    @property
    def linear(self) -> bool:
        """True if the penalty is linear in KL_hat, so that it is a sum over tokens and needs no first pass."""
        return self.kind != SQUARED_HINGE

    @property
    def likely_tokens(self) -> int:
        """K, the number of old's likeliest tokens that the estimator compares; 0 if it compares none."""
        return self.top_k if self.estimator == TOP_K and self.kind != NONE else 0

    @property
    def needs(self) -> frozenset[str]:
        """The optional fields of MiniBatch that KL_hat reads."""
        return frozenset({"divergences"} if self.likely_tokens else ())

    @property
    def strength(self) -> float:
        """beta; if None, the default of the kind."""
        return _DEFAULT_BETA[self.kind] if self.beta is None else self.beta

    @property
    def limit(self) -> float | None:
        """delta, if the kind has a threshold; else None."""
        return self.delta if self.kind in (SQUARED_HINGE, DUAL) else None

    def token_terms(self, log_probs: Tensor, old_log_probs: Tensor, divergences: Tensor | None) -> Tensor:
        """Each token's term, whose mean over the mini-batch is KL_hat. All of one shape; divergences: for top_k, which
        raises ValueError without them."""
        if self.likely_tokens:
            if divergences is None:
                raise ValueError("constraint: the estimator top_k needs the divergences of the mini-batch's tokens")
            return divergences
        return old_log_probs - log_probs if self.estimator == K1 else k3(old_log_probs, log_probs)

    def penalty(self, kl: Tensor) -> Tensor:
        """The penalty of KL_hat, 0-d. If `linear`, also elementwise: the penalties of the tokens' shares of KL_hat."""
        if self.kind == NONE:
            return kl * 0.0
        if self.linear:
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

    def ascend(self, kl: float) -> Constraint:
        """The constraint for the next step, given the KL after this one; the same one unless the kind is dual.

        A step of dual ascent on log beta (exponentiated gradient, so that beta stays positive and finds its order of
        magnitude): beta exp(rate (KL / delta - 1)), the excess cut to [-1, 1], then beta to [beta_min, beta_max].
        """
        if self.kind != DUAL or not math.isfinite(kl):
            return self
        return self.with_multiplier(self.strength * math.exp(self.rate * max(-1.0, min(1.0, kl / self.delta - 1))))

    def with_multiplier(self, beta: float) -> Constraint:
        """The constraint with this beta, cut to its bounds; the same one unless the kind is dual."""
        if self.kind != DUAL or self.beta_min is None or self.beta_max is None:
            return self
        return replace(self, beta=max(self.beta_min, min(self.beta_max, beta)))


UNCONSTRAINED = Constraint()
HINGED = Constraint(kind=SQUARED_HINGE)
