"""Policy gradients with another limit than the clip of each token's ratio: GSPO, CISPO, SAPO, DPPO and its successor.

Advantages and reductions are those of policy_gradient.py. old is the trainer's log-prob, also where a paper takes the
rollout engine's: algorithm.off_policy corrects for the difference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from nemo_disco.algorithms.objectives.base import Objective, SeparableObjective, Tokens
from nemo_disco.algorithms.objectives.mini_batch import MiniBatch
from nemo_disco.algorithms.objectives.parameters import parameter
from nemo_disco.algorithms.objectives.policy_gradient import centered_by_limit, per_response_mean, standardize
from nemo_disco.algorithms.objectives.scores import clipped_ratios

TOTAL_VARIATION = "total_variation"
KL = "kl"

# DPPO's thresholds, by divergence: those of the authors' scripts.
_DEFAULT_LIMIT = {TOTAL_VARIATION: 0.15, KL: 0.05}


@dataclass(frozen=True, kw_only=True)
class GSPO(Objective):
    """GSPO: J = (1/N) sum_o min(s A, clip(s, 1 - clip_low, 1 + clip_high) A), A as in GRPO (arXiv 2507.18071, eq. 5).

    s = exp((1/|o|) sum_t (lp - old)) is the ratio of the whole response (eq. 7). It varies less than a token's, so the
    clips are far smaller (section 5.1). An empty response has no ratio and adds nothing.
    """

    name: ClassVar[str] = "gspo"
    clip_low: float = parameter(3e-4, at_least=0, below=1)
    clip_high: float = parameter(4e-4, at_least=0)

    def value(self, batch: MiniBatch) -> Tensor:
        advantages = torch.where(batch.lengths > 0, standardize(batch), 0.0)
        log_ratios = batch.token_mean(batch.log_probs - batch.old_log_probs)
        ratios = clipped_ratios(log_ratios, torch.zeros_like(log_ratios), advantages, self.clip_low, self.clip_high)
        return (advantages * ratios).sum() / len(batch.lengths)


@dataclass(frozen=True, kw_only=True)
class CISPO(SeparableObjective):
    """CISPO: J = (1/T) sum_o sum_t sg(min(rho, 1 + clip_high)) A lp, A as in GRPO (arXiv 2506.13585, eq. 4 and 5).

    sg: held constant in the gradient, so that a token's gradient is bounded and never dropped. The paper's lower clip
    is left out, as in its experiments. It does not state its clip_high; the default, a weight of at most 5, is that of
    other implementations, after the study of arXiv 2510.13786.
    """

    name: ClassVar[str] = "cispo"
    clip_high: float = parameter(4.0, at_least=0)

    def response_weights(self, batch: MiniBatch) -> Tensor:
        return standardize(batch) / max(batch.n_tokens, 1)

    def token_values(self, tokens: Tokens) -> Tensor:
        fixed = tokens.log_probs.detach()
        ratios = clipped_ratios(fixed, tokens.old_log_probs, torch.ones_like(fixed), None, self.clip_high)
        return tokens.weights * ratios * tokens.log_probs


@dataclass(frozen=True, kw_only=True)
class SAPO(SeparableObjective):
    """SAPO: J = (1/N) sum_o (1/|o|) sum_t f(rho) A, f(x) = (4/tau) sigmoid(tau (x - 1)) (arXiv 2511.20347, eq. 5, 6).

    A as in GRPO; tau is tau_positive where A > 0, else tau_negative. The gradient is that of the unclipped ratio,
    rho A grad lp, times 4 p (1 - p) with p = sigmoid(tau (rho - 1)): 1 at rho = 1, less the more the token has moved.
    """

    name: ClassVar[str] = "sapo"
    tau_positive: float = parameter(1.0, above=0)
    tau_negative: float = parameter(1.05, above=0)

    def response_weights(self, batch: MiniBatch) -> Tensor:
        return per_response_mean(batch, standardize(batch))

    def token_values(self, tokens: Tokens) -> Tensor:
        tau = torch.full_like(tokens.weights, self.tau_negative)
        tau = tau.masked_fill(tokens.weights > 0, self.tau_positive)
        ratios = (tokens.log_probs - tokens.old_log_probs).exp()
        # exp(log sigmoid): sigmoid's own gradient, p (1 - p), loses its digits where p is nearly 1.
        gates = logsigmoid(tau * (ratios - 1)).exp()
        return tokens.weights * gates * 4 / tau


def binary_divergence(kind: str, log_probs: Tensor, old_log_probs: Tensor) -> Tensor:
    """[n] divergence of old from the policy in the question "this token or another" (arXiv 2602.04879): |p - old's p|
    for total_variation, in nats for kl. A lower bound of the divergence over the vocabulary.

    A log-prob that rounding put above 0 is taken as 0.
    """
    new, old = log_probs.clamp(max=0), old_log_probs.clamp(max=0)
    if kind == TOTAL_VARIATION:
        return (new.exp() - old.exp()).abs()
    others = -old.expm1()
    # xlogy: a term of probability 0 is 0. Where the policy gives the others nothing and old does not, it is infinite.
    return old.exp() * (old - new) + torch.xlogy(others, others) - torch.xlogy(others, -new.expm1())


@dataclass(frozen=True, kw_only=True)
class DPPO(SeparableObjective):
    """DPPO: J = (1/(N C)) sum_o sum_t M rho A, A = r - mean, C the maximum response length (arXiv 2602.04879).

    M is 0 for a token whose divergence (`binary_divergence`) exceeds divergence_limit and which A would push farther:
    A > 0 and rho > 1, or A < 0 and rho < 1; else 1. divergence_limit: by default 0.15 for total_variation and 0.05 for
    kl, as in the authors' scripts, whose A and reduction are these too. Left out: the paper's divergences over old's
    likeliest tokens (top-K), and a cap on rho. The paper measures rho and the divergence from the rollout engine's
    log-probs, here it is from old.
    """

    name: ClassVar[str] = "dppo"
    divergence: str = parameter(TOTAL_VARIATION, choices=(TOTAL_VARIATION, KL))
    divergence_limit: float | None = parameter(None, at_least=0, infinite=True)

    def response_weights(self, batch: MiniBatch) -> Tensor:
        return centered_by_limit(batch)

    def token_values(self, tokens: Tokens) -> Tensor:
        log_probs, old = tokens.log_probs.detach(), tokens.old_log_probs
        limit = _DEFAULT_LIMIT[self.divergence] if self.divergence_limit is None else self.divergence_limit
        leaving = (log_probs - old) * tokens.weights > 0
        masked = leaving & (binary_divergence(self.divergence, log_probs, old) > limit)
        return tokens.weights * (tokens.log_probs - old).exp().masked_fill(masked, 0.0)


@dataclass(frozen=True, kw_only=True)
class DivergenceRegularized(SeparableObjective):
    """Divergence Regularized Policy Optimization (arXiv 2606.09821, eq. 8): DPPO with a quadratic term for its mask.

    J = (1/(N C)) sum_o sum_t [rho A - |A| / (2 d) exp(old) (rho - 1)^2], with A and C as in DPPO and d the
    divergence_limit: a token's gradient is rho A grad lp times 1 - sign(A (rho - 1)) |p - old's p| / d. Where DPPO with
    the same limit would begin to mask it is 0, and beyond it pulls back. Its authors call it DRPO, a name that the
    unrelated `drpo` has here. Their d, the default, changes a gradient by 8% at most, because probabilities differ by
    at most 1.
    """

    name: ClassVar[str] = "divergence_regularized"
    divergence_limit: float = parameter(12.5, above=0, infinite=True)

    def response_weights(self, batch: MiniBatch) -> Tensor:
        return centered_by_limit(batch)

    def token_values(self, tokens: Tokens) -> Tensor:
        ratios = (tokens.log_probs - tokens.old_log_probs).exp()
        curvature = tokens.weights.abs() * tokens.old_log_probs.exp() / (2 * self.divergence_limit)
        return tokens.weights * ratios - curvature * (ratios - 1).square()
