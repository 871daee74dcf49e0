"""Independent float64 reference of the length methods and off-policy corrections, as loops over floats.

A length method is GRPO or RLOO of reference.py, on rewards with a length term. The term is added to the reward, which
gives the paper's formula where the reward is the verdict, 0 or 1. Notation: reference.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

from .reference import Case, ExpectedOutput, grpo, grpo_advantage, rloo_advantage


def replace_rewards(case: Case, reward: Callable[[int], float]) -> Case:
    """The case with reward(i) for each response i; its verdicts stay those of the original rewards."""
    n = range(len(case.lengths))
    return replace(case, rewards=[reward(i) for i in n], correct=[case.is_right(i) for i in n])


def solve_rate(case: Case, i: int) -> Fraction:
    """p, the share of right responses among all responses to response i's question."""
    group = case.group(case.questions[i])
    return Fraction(sum(case.is_right(j) for j in group), len(group))


def relative_length(case: Case, i: int) -> float:
    """z = (|o| - mu) / (std + 1e-7) of response i; its question must have a right response.

    mu and the unbiased std, which is 0 for a single right response, are over the lengths of the question's right ones.
    """
    lengths = [Fraction(case.lengths[j]) for j in case.group(case.questions[i]) if case.is_right(j)]
    mean = sum(lengths) / len(lengths)
    variance = sum((x - mean) ** 2 for x in lengths) / max(len(lengths) - 1, 1)
    return float(case.lengths[i] - mean) / (math.sqrt(variance) + 1e-7)


def rloo_lp(case: Case, alpha: float = 0.2) -> ExpectedOutput:
    """RLOO-LP: RLOO on r = 1[right] (1 - alpha sigmoid(z)) (arXiv 2502.04463)."""

    def reward(i: int) -> float:
        if not case.is_right(i):
            return case.rewards[i]
        return case.rewards[i] - alpha / (1 + math.exp(-relative_length(case, i)))

    return grpo(replace_rewards(case, reward), advantage=rloo_advantage)


def alp(case: Case, beta: float = 1e-7) -> ExpectedOutput:
    """ALP: GRPO on r = 1[right] - beta |o| max(p, 1/K), K the question's number of responses (arXiv 2506.05256)."""

    def reward(i: int) -> float:
        size = len(case.group(case.questions[i]))
        return case.rewards[i] - beta * case.lengths[i] * float(max(solve_rate(case, i), Fraction(1, size)))

    return grpo(replace_rewards(case, reward))


def hapo(case: Case, weight: float = 0.1) -> ExpectedOutput:
    """HAPO: GRPO on r = 1 + w max(f, -0.7) for a right response, w min(f, 0) for a wrong one (arXiv 2505.11225).

    f = cos(min(pi |o| / (2 h), pi)), h the length of the question's shortest right response in earlier steps; where
    there is none, h is 0 and the reward has no length term.
    """

    def reward(i: int) -> float:
        h = case.shortest[i]
        if not h:
            return case.rewards[i]
        f = math.cos(min(math.pi * case.lengths[i] / (2 * h), math.pi))
        return case.rewards[i] + weight * (max(f, -0.7) if case.is_right(i) else min(f, 0))

    return grpo(replace_rewards(case, reward))


def grpo_lead(case: Case, alpha: float = 0.05, low: float = 0.4, high: float = 1.5) -> ExpectedOutput:
    """GRPO-LEAD: r = exp(-alpha z) for a right response, -1 for a wrong one (arXiv 2504.09696).

    GRPO's advantage A is then multiplied by w(p) where A > 0, else by w(1 - p), with
    w(p) = low + (high - low) / (1 + exp(10 (p - 0.75))).
    """

    def reward(i: int) -> float:
        return case.rewards[i] - 1 + (math.exp(-alpha * relative_length(case, i)) if case.is_right(i) else 0.0)

    def difficulty_weight(p: float) -> float:
        return low + (high - low) / (1 + math.exp(10 * (p - 0.75)))

    def advantage(c: Case, i: int) -> float:
        a, p = grpo_advantage(c, i), float(solve_rate(case, i))
        return a * difficulty_weight(p if a > 0 else 1 - p)

    return grpo(replace_rewards(case, reward), advantage=advantage)


def truncated_importance_sampling(
    objective: Callable[[Case], ExpectedOutput], case: Case, cap: float = 2.0
) -> ExpectedOutput:
    """The objective's output with each token's gradient times min(exp(old_t - generation_t), cap).

    The factor is that of IMPALA (arXiv 1802.01561).
    """
    output = objective(case)
    for t, gradient in enumerate(output.token_gradient):
        output.token_gradient[t] = gradient * min(math.exp(case.old[t] - case.generation[t]), cap)
    return output


def sequence_mask(objective: Callable[[Case], ExpectedOutput], case: Case, cap: float) -> ExpectedOutput:
    """The objective's output with a gradient of 0 in each response whose ratio is not within [1/cap, cap].

    The ratio is exp((1/|o|) sum_t (old_t - generation_t)), the geometric mean of its tokens' ratios.
    """
    output = objective(case)
    for i, length in enumerate(case.lengths):
        ratio = math.exp(math.fsum(case.old[t] - case.generation[t] for t in case.tokens(i)) / max(length, 1))
        for t in case.tokens(i) if not 1 / cap <= ratio <= cap else ():
            output.token_gradient[t] = 0.0
    return output
