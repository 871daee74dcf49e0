"""Per-token terms of the objectives, as elementwise functions of log-probs: scores, clipped ratios, the k3 estimate.

Notation: lp is a log-prob under the current policy, old under the one that sampled; rho = exp(lp - old).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOG_LIKELIHOOD = "log_likelihood"
LIKELIHOOD_RATIO = "likelihood_ratio"
SCORES = (LOG_LIKELIHOOD, LIKELIHOOD_RATIO)

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
    return difference.expm1() - difference
