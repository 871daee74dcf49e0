"""Per-token terms of the objectives, as elementwise functions of log-probs: scores, clipped ratios, estimates of a KL.

Notation: lp is a log-prob under the current policy, old under the one that sampled; rho = exp(lp - old).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOG_LIKELIHOOD = "log_likelihood"
LIKELIHOOD_RATIO = "likelihood_ratio"
SCORES = (LOG_LIKELIHOOD, LIKELIHOOD_RATIO)

# Estimators of KL(policy || reference): reference_kl.
K3_WEIGHTED = "k3_weighted"
K2 = "k2"
K3 = "k3"
KL_ESTIMATORS = (K3_WEIGHTED, K2, K3)

# The paper's temperature of the distributionally robust mean, by score (arXiv 2505.12366, experiments).
DEFAULT_TAU = {LOG_LIKELIHOOD: 10.0, LIKELIHOOD_RATIO: 1.0}


def token_scores(score: str, log_probs: Tensor, old_log_probs: Tensor) -> Tensor:
    """lp or rho of each token; the mean over a response is its score s(o, q) (arXiv 2505.12366, section 4.1)."""
    return log_probs if score == LOG_LIKELIHOOD else (log_probs - old_log_probs).exp()


def clipped_ratios(
    log_probs: Tensor, old_log_probs: Tensor, signs: Tensor, clip_low: float | None, clip_high: float | None
) -> Tensor:
    """f+(rho) = min(rho, 1 + clip_high) where the sign is positive, else f-(rho) = max(rho, 1 - clip_low).

    Multiplied by an advantage of that sign it is PPO's min(rho A, clip(rho) A): arXiv 2505.12366, Proposition 1. None
    does not clip. The logarithm is clipped, so that a ratio above the clip cannot overflow.
    """
    log_ratios = log_probs - old_log_probs
    above = log_ratios.clamp(max=math.inf if clip_high is None else math.log1p(clip_high))
    below = log_ratios.clamp(min=-math.inf if clip_low is None else math.log1p(-clip_low))
    return torch.where(signs > 0, above, below).exp()


def k3(log_probs: Tensor, other_log_probs: Tensor) -> Tensor:
    """Schulman's low-variance estimate of KL(policy || other): exp(d) - 1 - d with d = other - lp; never negative."""
    difference = other_log_probs - log_probs
    slopes = difference.expm1()
    return with_slopes(slopes - difference, slopes, difference)


def with_slopes(values: Tensor, slopes: Tensor, x: Tensor) -> Tensor:
    """The values, with the given slopes as their derivative in x, for where autograd's would have lost digits."""
    return values.detach() + slopes.detach() * (x - x.detach())


def reference_kl(estimator: str, log_probs: Tensor, old_log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    """Each token's term of KL(policy || reference), for tokens that old sampled; with d = reference - lp:

    k3_weighted   rho (exp(d) - 1 - d), differentiated through both factors: its expectation is the KL, and that of its
                  gradient the KL's gradient, for any old (arXiv 2512.02556 uses this estimate)
    k2            d^2 / 2: its gradient is unbiased where policy = old; its value is not
    k3            exp(d) - 1 - d: the value is unbiased where policy = old, but the gradient's expectation there is that
                  of the reverse, KL(reference || policy) (arXiv 2506.09477)

    Of one token's distribution: how earlier tokens change what follows is in none of them.
    """
    difference = reference_log_probs - log_probs
    if estimator == K2:
        return difference.square() / 2
    if estimator == K3:
        return k3(log_probs, reference_log_probs)
    ratios = (log_probs - old_log_probs).exp()
    return with_slopes(ratios * (difference.expm1() - difference), -ratios * difference, log_probs)
