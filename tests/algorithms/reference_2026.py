"""Independent float64 reference of GSPO, CISPO, SAPO, DPPO and its successor, MaxRL and ConSPO, as loops over floats.

And of the off-policy corrections that came with them. Gradients by hand; shares nothing with nemo_disco.algorithms.
Notation: reference.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from .reference import (
    Case,
    ExpectedOutput,
    center_reward,
    clipped_term,
    grpo_advantage,
    response_score,
    sum_clipped_terms,
)


def sum_token_terms(
    case: Case, advantage: Callable[[Case, int], float], divisor: Callable[[int], float], term: Callable
) -> ExpectedOutput:
    """J = sum_o (1/divisor(|o|)) sum_t term(A_o, lp_t, old_t), where term returns (value, derivative in lp)."""
    output = ExpectedOutput(case)
    for i, length in enumerate(case.lengths):
        a = advantage(case, i)
        for t in case.tokens(i):
            value, slope = term(a, case.lp[t], case.old[t])
            output.value += value / divisor(length)
            output.token_gradient[t] = slope / divisor(length)
    return output


def gspo(case: Case, low: float = 3e-4, high: float = 4e-4) -> ExpectedOutput:
    """GSPO: J = (1/N) sum_o min(s A, clip(s, 1 - low, 1 + high) A) over non-empty responses (arXiv 2507.18071, eq. 5).

    s = exp((1/|o|) sum_t (lp_t - old_t)); each token has 1/|o| of the derivative in log s.
    """
    output = ExpectedOutput(case)
    for i, length in enumerate(case.lengths):
        if length:
            log_ratio = math.fsum(case.lp[t] - case.old[t] for t in case.tokens(i)) / length
            value, slope = clipped_term(grpo_advantage(case, i), log_ratio, 0.0, low, high)
            output.value += value / len(case.lengths)
            for t in case.tokens(i):
                output.token_gradient[t] = slope / length / len(case.lengths)
    return output


def cispo(case: Case, high: float = 4.0) -> ExpectedOutput:
    """CISPO: J = (1/T) sum_o sum_t c A lp, c = min(rho, 1 + high) held constant (arXiv 2506.13585, eq. 4 and 5)."""

    def term(a: float, lp: float, old: float) -> tuple[float, float]:
        weight = min(math.exp(lp - old), 1 + high) * a
        return weight * lp, weight

    return sum_token_terms(case, grpo_advantage, lambda _: len(case.lp), term)


def sapo(case: Case, positive: float = 1.0, negative: float = 1.05) -> ExpectedOutput:
    """SAPO: J = (1/N) sum_o (1/|o|) sum_t A (4/tau) sigmoid(tau (rho - 1)) (arXiv 2511.20347, eq. 5 to 8).

    tau is `positive` where A > 0, else `negative`. Derivative: 4 p (1 - p) rho A, p the sigmoid.
    """

    def term(a: float, lp: float, old: float) -> tuple[float, float]:
        rho, tau = math.exp(lp - old), positive if a > 0 else negative
        x = tau * (rho - 1)
        other = math.exp(-abs(x)) / (1 + math.exp(-abs(x)))  # the smaller of p and 1 - p
        p = 1 - other if x > 0 else other
        return a * 4 / tau * p, 4 * other * (1 - other) * rho * a

    return sum_token_terms(case, grpo_advantage, lambda length: len(case.lengths) * length, term)


def centered_reward(case: Case, i: int) -> float:
    """Dr. GRPO's advantage, r_i - mean (arXiv 2503.20783)."""
    return center_reward(case, i)[0]


def dppo(case: Case, divergence: str = "total_variation", limit: float = 0.15) -> ExpectedOutput:
    """DPPO: J = (1/N) sum_o (1/C) sum_t M rho A, A = r - mean (arXiv 2602.04879).

    M = 0 where the divergence is above the limit and (A > 0 and rho > 1, or A < 0 and rho < 1), else 1. The divergence
    is |new - old| (total_variation) or old log(old/new) + (1 - old) log((1 - old)/(1 - new)) (kl), of the token's
    probabilities, at most 1, under the policy that sampled and the current one.
    """

    def difference(lp: float, old: float) -> float:
        lp, old = min(lp, 0.0), min(old, 0.0)
        if divergence == "total_variation":
            return abs(math.exp(lp) - math.exp(old))
        others_before, others_after = -math.expm1(old), -math.expm1(lp)
        token = math.exp(old) * (old - lp)
        if others_before == 0:
            return token
        return token + others_before * math.log(others_before / others_after) if others_after else math.inf

    def term(a: float, lp: float, old: float) -> tuple[float, float]:
        pushed_away = (a > 0 and lp > old) or (a < 0 and lp < old)
        value = 0.0 if pushed_away and difference(lp, old) > limit else math.exp(lp - old) * a
        return value, value

    return sum_token_terms(case, centered_reward, lambda _: len(case.lengths) * case.limit, term)


def divergence_regularized(case: Case, limit: float = 12.5) -> ExpectedOutput:
    """J = (1/N) sum_o (1/C) sum_t [rho A - |A| / (2 limit) exp(old) (rho - 1)^2] (arXiv 2606.09821, eq. 8).

    A = r - mean. Derivative: rho A - |A| / limit exp(old) (rho - 1) rho.
    """

    def term(a: float, lp: float, old: float) -> tuple[float, float]:
        rho, change, before = math.exp(lp - old), math.expm1(lp - old), math.exp(old)
        value = rho * a - abs(a) / (2 * limit) * before * change**2
        return value, rho * a - abs(a) / limit * before * change * rho

    return sum_token_terms(case, centered_reward, lambda _: len(case.lengths) * case.limit, term)


def maxrl_advantage(case: Case, i: int) -> float:
    """MaxRL: A = (r_i - mean) / mean, 0 where the mean of the group's rewards is at most 1e-6 (arXiv 2602.02710)."""
    group = case.group(case.questions[i])
    mean = math.fsum(case.rewards[j] for j in group) / len(group)
    return center_reward(case, i)[0] / mean if mean > 1e-6 else 0.0


def maxrl(case: Case) -> ExpectedOutput:
    """MaxRL: J = (1/T) sum_o sum_t min(rho A, clip(rho, 0.8, 1.2) A) (arXiv 2602.02710 and its code)."""
    return sum_clipped_terms(case, maxrl_advantage, lambda _: len(case.lp))


def conspo(case: Case, tau: float = 10.0, margin: float = 0.01, steps: int = 300) -> ExpectedOutput:
    """ConSPO: J = (1/|B|) sum_q mean_{i in S+} tau log P_i over questions with S+ and S- (arXiv 2605.12969, eq. 13).

    P_i = e(s_i - m) / (e(s_i - m) + sum_{j in S-} e(s_j)), e(x) = exp(x / tau), s the token mean of lp, and
    m = margin / 2 (1 - cos(pi min(step / steps, 1))), or margin if steps is 0. Derivatives (lemma 2): (1 - P_i) / |S+|
    in s_i, and -sum_i P_ij / |S+| in s_j, P_ij the share of j in the denominator of P_i.
    """
    m = margin / 2 * (1 - math.cos(math.pi * min(case.step / steps, 1))) if steps else margin
    output = ExpectedOutput(case)
    questions = sorted(set(case.questions))
    for q in questions:
        scored = [i for i in case.group(q) if case.lengths[i]]
        right, wrong = [i for i in scored if case.is_right(i)], [i for i in scored if not case.is_right(i)]
        score = {i: response_score(case, "log_likelihood", i) for i in scored}
        for i in right if wrong else ():
            logits = {j: score[j] / tau for j in wrong} | {i: (score[i] - m) / tau}
            top = max(logits.values())
            total = math.fsum(math.exp(x - top) for x in logits.values())
            scale = 1 / len(right) / len(questions)
            # log P_i from the other shares, so that no digits are lost where P_i is nearly 1
            others = math.fsum(math.exp(logits[j] - logits[i]) for j in wrong)
            output.value -= scale * tau * math.log1p(others)
            for j, x in logits.items():
                share = math.exp(x - top) / total
                slope = math.fsum(math.exp(logits[k] - top) for k in wrong) / total if j == i else -share
                for t in case.tokens(j):
                    output.token_gradient[t] += scale * slope / case.lengths[j]
    return output


def correct_gradients(
    factor: Callable[[list[float], int], float], objective: Callable[[Case], ExpectedOutput], case: Case
) -> ExpectedOutput:
    """The objective's output with each token's gradient times factor(ratios of its response, its place there).

    The ratios are exp(old_t - generation_t).
    """
    output = objective(case)
    for i in range(len(case.lengths)):
        ratios = [math.exp(case.old[t] - case.generation[t]) for t in case.tokens(i)]
        for place, t in enumerate(case.tokens(i)):
            output.token_gradient[t] *= factor(ratios, place)
    return output


def sequence_importance_sampling(
    objective: Callable[[Case], ExpectedOutput], case: Case, cap: float = 2.0
) -> ExpectedOutput:
    """The objective's output with each token's gradient times min(product of its response's ratios, cap)."""
    return correct_gradients(lambda ratios, _: min(math.prod(ratios), cap), objective, case)


def icepop(
    objective: Callable[[Case], ExpectedOutput], case: Case, floor: float = 0.5, cap: float = 5.0
) -> ExpectedOutput:
    """The objective's output, each token's gradient times its ratio if in [floor, cap], else 0 (arXiv 2510.18855)."""
    return correct_gradients(lambda ratios, k: ratios[k] if floor <= ratios[k] <= cap else 0.0, objective, case)


def outlier_mask(
    objective: Callable[[Case], ExpectedOutput], case: Case, floor: float = 1e-4, cap: float = 100.0
) -> ExpectedOutput:
    """The objective's output with a gradient of 0 in each response that has a ratio outside [floor, cap]."""
    return correct_gradients(lambda ratios, _: float(floor <= min(ratios) and max(ratios) <= cap), objective, case)
