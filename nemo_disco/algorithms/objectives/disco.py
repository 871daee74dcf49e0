"""DisCO-b, DisCO (arXiv 2505.12366) and DRPO (arXiv 2510.04474): right responses' scores above wrong ones'.

S+ and S- are a question's right and wrong responses, by the verdict and not by a shaped reward; an empty response has
no score and is in neither. A question without both adds nothing, and counts in |B|. Axes Q, G: mini_batch.Groups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from nemo_disco.algorithms.objectives.base import Objective, SeparableObjective, Tokens
from nemo_disco.algorithms.objectives.constraint import HINGED, Constraint
from nemo_disco.algorithms.objectives.mini_batch import MiniBatch
from nemo_disco.algorithms.objectives.parameters import parameter
from nemo_disco.algorithms.objectives.scores import (
    DEFAULT_TAU,
    LIKELIHOOD_RATIO,
    LOG_LIKELIHOOD,
    SCORES,
    clipped_ratios,
    token_scores,
)
from nemo_disco.runtime.errors import UserError


def right_and_wrong(batch: MiniBatch, correct: Tensor) -> tuple[Tensor, Tensor]:
    """S+ and S- as two masks [Q, G] of the questions that have both; all False for the others."""
    scored = batch.groups.table(batch.lengths > 0)
    verdict = batch.groups.table(correct)
    right, wrong = scored & verdict, scored & ~verdict
    mixed = right.any(1, keepdim=True) & wrong.any(1, keepdim=True)
    return right & mixed, wrong & mixed


def uniform(members: Tensor) -> Tensor:
    """[Q, G] 1/|S| for each member of a row's set S, else 0."""
    return members.double() / members.sum(1, keepdim=True).clamp(min=1)


def softmax_over(members: Tensor, values: Tensor) -> Tensor:
    """[Q, G] the softmax of each row over its members, else 0."""
    return values.masked_fill(~members, -math.inf).softmax(1).masked_fill(~members, 0.0)


def robust_mean(members: Tensor, scores: Tensor, tau: float) -> Tensor:
    """[Q] tau log mean_S exp(s / tau): the DRO mean, between the mean (tau -> infinity) and the maximum (tau -> 0).

    Written around the maximum with expm1 and log1p: neither a large s nor a large tau loses digits; an empty S gives 0.
    """
    top = scores.detach().masked_fill(~members, -math.inf).amax(1).masked_fill(~members.any(1), 0.0)
    below = (scores - top[:, None]).masked_fill(~members, 0.0)
    return top + tau * (uniform(members) * (below / tau).expm1()).sum(1).log1p()


@dataclass(frozen=True, kw_only=True)
class DisCOb(SeparableObjective):
    """DisCO-b: J1 = (1/|B|) sum_q [mean_{S+} s - mean_{S-} s] (arXiv 2505.12366).

    Ablations of the paper: clip_low, clip_high (epsilons, of the ratio score) replace rho by min(rho, 1 + clip_high)
    in S+ and max(rho, 1 - clip_low) in S-; question_weight multiplies a question's term by sqrt(p (1 - p)), GRPO's
    difficulty weight, with p = |S+| / (|S+| + |S-|).
    """

    name: ClassVar[str] = "disco_b"
    constraint: Constraint = HINGED
    score: str = parameter(LOG_LIKELIHOOD, choices=SCORES)
    clip_low: float | None = parameter(None, at_least=0, below=1)
    clip_high: float | None = parameter(None, at_least=0)
    question_weight: bool = parameter(False, choices=(True, False))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score != LIKELIHOOD_RATIO and (self.clip_low is not None or self.clip_high is not None):
            raise UserError(
                f"{self.label()}clip_low and clip_high clip the score {LIKELIHOOD_RATIO}; score is {self.score}"
            )

    def response_weights(self, batch: MiniBatch) -> Tensor:
        right, wrong = right_and_wrong(batch, self.correct(batch))
        weights = uniform(right) - uniform(wrong)
        if self.question_weight:
            p = uniform(right | wrong).mul(right).sum(1, keepdim=True)
            weights = weights * (p * (1 - p)).sqrt()
        return batch.groups.flat(weights) / len(batch.groups) / batch.lengths.clamp(min=1)

    def token_values(self, tokens: Tokens) -> Tensor:
        if self.score == LOG_LIKELIHOOD:
            return tokens.weights * tokens.log_probs
        clip = (self.clip_low, self.clip_high)
        return tokens.weights * clipped_ratios(tokens.log_probs, tokens.old_log_probs, tokens.weights, *clip)


@dataclass(frozen=True, kw_only=True)
class DisCO(Objective):
    """DisCO: J2 = (1/|B|) sum_q [mean_{S+} s - tau log mean_{S-} exp(s / tau)] (arXiv 2505.12366, Algorithm 1).

    tau: by default 10 for log_likelihood and 1 for likelihood_ratio, as the authors did; tau -> infinity is DisCO-b.
    """

    name: ClassVar[str] = "disco"
    constraint: Constraint = HINGED
    score: str = parameter(LOG_LIKELIHOOD, choices=SCORES)
    tau: float | None = parameter(None, above=0)

    def value(self, batch: MiniBatch) -> Tensor:
        right, wrong = right_and_wrong(batch, self.correct(batch))
        return self.contrast(batch, uniform(right), wrong)

    @property
    def temperature(self) -> float:
        """tau; if None, the score's default."""
        return DEFAULT_TAU[self.score] if self.tau is None else self.tau

    def scores(self, batch: MiniBatch) -> Tensor:
        """[Q, G] s(o, q); 0 for an empty response."""
        per_token = token_scores(self.score, batch.log_probs, batch.old_log_probs)
        return batch.groups.table(batch.token_mean(per_token))

    def diagnostics(self, batch: MiniBatch) -> dict[str, float]:
        """The DRO weights' effective sample size over the number of wrong responses, (sum w)^2 / (n sum w^2): 1 where
        tau makes no difference, 1/n where one response has all the weight. Over questions with two or more of S-."""
        _, wrong = right_and_wrong(batch, self.correct(batch))
        counts = wrong.sum(1)
        weights = softmax_over(wrong, self.scores(batch) / self.temperature)[counts > 1]
        if not len(weights):
            return {}
        return {"dro/effective_sample": float((1 / weights.square().sum(1) / counts[counts > 1]).mean())}

    def contrast(self, batch: MiniBatch, right_weights: Tensor, wrong: Tensor) -> Tensor:
        """(1/|B|) sum_q [sum_{S+} w s - tau log mean_{S-} exp(s / tau)], for weights w [Q, G] of S+ and the mask S-."""
        scores, tau = self.scores(batch), self.temperature
        return ((right_weights * scores).sum(1) - robust_mean(wrong, scores, tau)).sum() / len(batch.groups)


@dataclass(frozen=True, kw_only=True)
class DRPO(DisCO):
    """DRPO: DisCO with S+ weighted by w = softmax_{S+} of r(o) / lambda, r a preference (arXiv 2510.04474).

    preference: "length" is r(o) = 1 - |o|/C, for short answers; C is the maximum response length (the released code's
    is a padded batch's width). Any other names a reward term, whose values are the column `preference`.
    lambda -> infinity is DisCO.
    """

    name: ClassVar[str] = "drpo"
    lambda_: float = parameter(0.1, above=0, infinite=True)
    preference: str = "length"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.preference, str):
            raise UserError(f"{self.label()}preference must be the name of a reward term; it is {self.preference!r}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset(self.reward_terms)

    @property
    def reward_terms(self) -> dict[str, str]:
        return {} if self.preference == "length" else {"preference": self.preference}

    def preferences(self, batch: MiniBatch) -> Tensor:
        """[N] r(o), by which right responses are weighted."""
        if self.preference != "length":
            return batch["preference"]
        return 1 - batch.lengths.double() / batch.max_response_length

    def value(self, batch: MiniBatch) -> Tensor:
        right, wrong = right_and_wrong(batch, self.correct(batch))
        weights = softmax_over(right, batch.groups.table(self.preferences(batch)) / self.lambda_)
        return self.contrast(batch, weights, wrong)
