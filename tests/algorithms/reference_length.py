"""The length methods and the off-policy corrections once more, by loops over floats: see reference.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

from .reference import Answer, Case, grpo, grpo_advantage, rloo_advantage


def shaped(case: Case, reward: Callable[[int], float]) -> Case:
    """The case with rewards of its own, and the verdicts of before."""
    n = range(len(case.lengths))
    return replace(case, rewards=[reward(i) for i in n], correct=[case.right(i) for i in n])


def solve_rate(case: Case, i: int) -> Fraction:
    group = case.group(case.questions[i])
    return Fraction(sum(case.right(j) for j in group), len(group))


def relative_length(case: Case, i: int) -> float:
    lengths = [Fraction(case.lengths[j]) for j in case.group(case.questions[i]) if case.right(j)]
    mean = sum(lengths) / len(lengths)
    variance = sum((x - mean) ** 2 for x in lengths) / max(len(lengths) - 1, 1)
    return float(case.lengths[i] - mean) / (math.sqrt(variance) + 1e-7)


def rloo_lp(case: Case, alpha: float = 0.2) -> Answer:
    def reward(i: int) -> float:
        if not case.right(i):
            return case.rewards[i]
        return case.rewards[i] - alpha / (1 + math.exp(-relative_length(case, i)))

    return grpo(shaped(case, reward), advantage=rloo_advantage)


def alp(case: Case, beta: float = 1e-7) -> Answer:
    def reward(i: int) -> float:
        size = len(case.group(case.questions[i]))
        return case.rewards[i] - beta * case.lengths[i] * float(max(solve_rate(case, i), Fraction(1, size)))

    return grpo(shaped(case, reward))


def hapo(case: Case, weight: float = 0.1) -> Answer:
    def reward(i: int) -> float:
        h = case.shortest[i]
        if not h:
            return case.rewards[i]
        f = math.cos(min(math.pi * case.lengths[i] / (2 * h), math.pi))
        return case.rewards[i] + weight * (max(f, -0.7) if case.right(i) else min(f, 0))

    return grpo(shaped(case, reward))


def grpo_lead(case: Case, alpha: float = 0.05, low: float = 0.4, high: float = 1.5) -> Answer:
    def reward(i: int) -> float:
        return case.rewards[i] - 1 + (math.exp(-alpha * relative_length(case, i)) if case.right(i) else 0.0)

    def weight(p: float) -> float:
        return low + (high - low) / (1 + math.exp(10 * (p - 0.75)))

    def advantage(c: Case, i: int) -> float:
        a, p = grpo_advantage(c, i), float(solve_rate(case, i))
        return a * weight(p if a > 0 else 1 - p)

    return grpo(shaped(case, reward), advantage=advantage)


def truncated(reference: Callable[[Case], Answer], case: Case, cap: float = 2.0) -> Answer:
    answer = reference(case)
    for t, gradient in enumerate(answer.lp):
        answer.lp[t] = gradient * min(math.exp(case.old[t] - case.generation[t]), cap)
    return answer


def masked(reference: Callable[[Case], Answer], case: Case, cap: float) -> Answer:
    answer = reference(case)
    for i, length in enumerate(case.lengths):
        ratio = math.exp(math.fsum(case.old[t] - case.generation[t] for t in case.tokens(i)) / max(length, 1))
        for t in case.tokens(i) if not 1 / cap <= ratio <= cap else ():
            answer.lp[t] = 0.0
    return answer
