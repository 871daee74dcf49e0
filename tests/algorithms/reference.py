"""The objectives once more, from the papers' formulas alone: loops over floats, gradients by hand, group statistics in
exact fractions. Shares nothing with nemo_disco.algorithms, not even torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction


@dataclass
class Case:
    """One mini-batch as plain lists."""

    lp: list[float]
    old: list[float]
    lengths: list[int]
    questions: list[int]
    rewards: list[float]
    limit: int
    entropies: list[float]
    reference: list[float]
    correct: list[bool] | None = None
    threshold: float = 0.5
    generation: list[float] = field(default_factory=list)
    preferences: list[float] = field(default_factory=list)
    shortest: list[int] = field(default_factory=list)

    def tokens(self, i: int) -> range:
        start = sum(self.lengths[:i])
        return range(start, start + self.lengths[i])

    def group(self, question: int) -> list[int]:
        return [i for i, q in enumerate(self.questions) if q == question]

    def right(self, i: int) -> bool:
        return self.rewards[i] > self.threshold if self.correct is None else self.correct[i]


@dataclass
class Answer:
    """J, its gradient in lp and in the entropies, and after `penalise` the loss with its gradient."""

    case: Case
    value: float = 0.0
    lp: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    loss: float = 0.0
    kl: float = 0.0

    def __post_init__(self) -> None:
        self.lp = [0.0] * len(self.case.lp)
        self.entropies = [0.0] * len(self.case.lp)

    def penalise(self, kind: str, beta: float, delta: float, convention: str) -> None:
        total = max(len(self.lp), 1)
        self.kl = math.fsum(o - x for o, x in zip(self.case.old, self.case.lp, strict=True)) / total
        penalty = slope = 0.0
        if kind == "kl_regularization":
            penalty, slope = beta * self.kl, beta
        elif kind == "squared_hinge" and self.kl > delta:
            excess = self.kl - delta
            if convention == "paper":
                penalty, slope = beta * excess * excess, 2 * beta * excess
            else:
                penalty, slope = beta * excess * self.kl, beta * excess
        self.loss = penalty - self.value
        self.lp = [-g - slope / total for g in self.lp]
        self.entropies = [-g for g in self.entropies]


def token_score(score: str, lp: float, old: float) -> tuple[float, float]:
    """A token's score and its derivative."""
    return (lp, 1.0) if score == "log_likelihood" else (math.exp(lp - old), math.exp(lp - old))


def response_score(case: Case, score: str, i: int) -> float:
    return math.fsum(token_score(score, case.lp[t], case.old[t])[0] for t in case.tokens(i)) / case.lengths[i]


def clipped(advantage: float, lp: float, old: float, low: float, high: float) -> tuple[float, float]:
    """min(rho A, clip(rho) A) and its derivative in lp."""
    rho = math.exp(lp - old)
    bounded = min(max(rho, 1 - low), 1 + high)
    if rho * advantage <= bounded * advantage:
        return rho * advantage, rho * advantage
    return bounded * advantage, 0.0


def contrastive(case: Case, score: str, right_weights: Callable, wrong_part: Callable, question_weight: bool) -> Answer:
    """mean over questions of sum_{S+} w s - D(S-): both parts give (their value, the weights of the scores in them)."""
    answer = Answer(case)
    questions = sorted(set(case.questions))
    for q in questions:
        scored = [i for i in case.group(q) if case.lengths[i]]
        right, wrong = [i for i in scored if case.right(i)], [i for i in scored if not case.right(i)]
        if not right or not wrong:
            continue
        p = len(right) / len(scored)
        scale = (math.sqrt(p * (1 - p)) if question_weight else 1.0) / len(questions)
        weights = right_weights(right)
        value, wrong_weights = wrong_part([response_score(case, score, i) for i in wrong])
        plus = math.fsum(w * response_score(case, score, i) for w, i in zip(weights, right, strict=True))
        answer.value += scale * (plus - value)
        coefficients = list(zip(right, weights, strict=True)) + [
            (i, -w) for i, w in zip(wrong, wrong_weights, strict=True)
        ]
        for i, w in coefficients:
            for t in case.tokens(i):
                answer.lp[t] = scale * w * token_score(score, case.lp[t], case.old[t])[1] / case.lengths[i]
    return answer


def plain_mean(scores: list[float]) -> tuple[float, list[float]]:
    return math.fsum(scores) / len(scores), [1 / len(scores)] * len(scores)


def log_mean_exp(scores: list[float], tau: float) -> tuple[float, list[float]]:
    top = max(scores)
    exps = [math.exp((s - top) / tau) for s in scores]
    total = math.fsum(exps)
    return top + tau * math.log(total / len(scores)), [e / total for e in exps]


def disco_b(case: Case, score: str = "log_likelihood", question_weight: bool = False) -> Answer:
    return contrastive(case, score, lambda right: [1 / len(right)] * len(right), plain_mean, question_weight)


def disco(case: Case, score: str = "log_likelihood", tau: float | None = None) -> Answer:
    return drpo(case, score, tau, math.inf)


def drpo(
    case: Case, score: str = "log_likelihood", tau: float | None = None, lambda_: float = 0.1, own: bool = False
) -> Answer:
    tau = tau or {"log_likelihood": 10.0, "likelihood_ratio": 1.0}[score]

    def right_weights(right: list[int]) -> list[float]:
        preferences = [(case.preferences[i] if own else 1 - case.lengths[i] / case.limit) / lambda_ for i in right]
        exps = [math.exp(r - max(preferences)) for r in preferences]
        return [e / math.fsum(exps) for e in exps]

    return contrastive(case, score, right_weights, lambda scores: log_mean_exp(scores, tau), False)


def disco_b_clipped(case: Case, low: float, high: float) -> Answer:
    """DisCO-b with f+ and f-: an advantage of the sign of the side, through PPO's minimum."""
    answer = Answer(case)
    questions = sorted(set(case.questions))
    for q in questions:
        scored = [i for i in case.group(q) if case.lengths[i]]
        right = [i for i in scored if case.right(i)]
        if not 0 < len(right) < len(scored):
            continue
        for i in scored:
            side = 1 / len(right) if case.right(i) else -1 / (len(scored) - len(right))
            for t in case.tokens(i):
                value, slope = clipped(side / len(questions) / case.lengths[i], case.lp[t], case.old[t], low, high)
                answer.value += value
                answer.lp[t] = slope
    return answer


def centre(case: Case, i: int) -> tuple[float, float]:
    """r_i minus the mean of its group, and the group's unbiased standard deviation."""
    rewards = [Fraction(case.rewards[j]) for j in case.group(case.questions[i])]
    mean = sum(rewards) / len(rewards)
    variance = sum((r - mean) ** 2 for r in rewards) / max(len(rewards) - 1, 1)
    return float(Fraction(case.rewards[i]) - mean), math.sqrt(float(variance))


def grpo_advantage(case: Case, i: int) -> float:
    difference, std = centre(case, i)
    return difference / (std + 1e-6)


def grpo_rw_advantage(case: Case, i: int) -> float:
    verdicts = [case.right(j) for j in case.group(case.questions[i])]
    p = sum(verdicts) / len(verdicts)
    return grpo_advantage(case, i) / math.sqrt(p * (1 - p)) if 0 < p < 1 else 0.0


def rloo_advantage(case: Case, i: int) -> float:
    others = [Fraction(case.rewards[j]) for j in case.group(case.questions[i]) if j != i]
    return float(Fraction(case.rewards[i]) - sum(others) / len(others)) if others else 0.0


def gpg_advantage(case: Case, i: int) -> float:
    n = len(case.rewards)
    degenerate = sum(len({case.rewards[k] for k in case.group(case.questions[j])}) == 1 for j in range(n))
    return n / (n - degenerate) * centre(case, i)[0] if degenerate < n else 0.0


def surrogate(case: Case, advantage: Callable, divisor: Callable, low: float = 0.2, high: float = 0.2) -> Answer:
    """sum over responses of the clipped surrogate over a divisor of the response's length."""
    answer = Answer(case)
    for i in range(len(case.lengths)):
        a = advantage(case, i)
        for t in case.tokens(i):
            value, slope = clipped(a, case.lp[t], case.old[t], low, high)
            answer.value += value / divisor(case.lengths[i])
            answer.lp[t] = slope / divisor(case.lengths[i])
    return answer


def grpo(
    case: Case, advantage: Callable = grpo_advantage, kl: float = 0.0, entropy: float = 0.0, **clip: float
) -> Answer:
    answer = surrogate(case, advantage, lambda length: len(case.lengths) * length, **clip)
    total = len(case.lp)
    for t in range(total):
        d = case.reference[t] - case.lp[t]
        answer.value += (entropy * case.entropies[t] - kl * (math.exp(d) - d - 1)) / total
        answer.lp[t] += kl * (math.exp(d) - 1) / total
        answer.entropies[t] = entropy / total
    return answer


def dr_grpo(case: Case) -> Answer:
    return surrogate(case, lambda c, i: centre(c, i)[0], lambda _: len(case.lengths) * case.limit)


def dapo(case: Case) -> Answer:
    return surrogate(case, grpo_advantage, lambda _: len(case.lp), 0.2, 0.28)


def gpg(case: Case) -> Answer:
    answer = Answer(case)
    for i, length in enumerate(case.lengths):
        for t in case.tokens(i):
            answer.lp[t] = gpg_advantage(case, i) / len(case.lengths) / length
            answer.value += answer.lp[t] * case.lp[t]
    return answer


def trpa(case: Case, beta: float = 0.1, kl: float = 1e-3) -> Answer:
    answer = Answer(case)
    scored = [i for i, length in enumerate(case.lengths) if length]
    rise = {i: math.fsum(case.lp[t] - case.old[t] for t in case.tokens(i)) / case.lengths[i] for i in scored}
    pairs = [
        (i, j)
        for i in scored
        for j in scored
        if case.questions[i] == case.questions[j] and case.rewards[i] > case.rewards[j]
    ]
    for i, j in pairs:
        m = beta * (rise[i] - rise[j])
        answer.value += (min(m, 0.0) - math.log1p(math.exp(-abs(m)))) / len(pairs)
        pull = 1 / (1 + math.exp(m)) if m < 0 else math.exp(-m) / (1 + math.exp(-m))
        for k, sign in ((i, 1), (j, -1)):
            for t in case.tokens(k):
                answer.lp[t] += sign * pull * beta / case.lengths[k] / len(pairs)
    for t in range(len(case.lp)):
        d = case.old[t] - case.lp[t]
        answer.value -= kl * (math.exp(d) - d - 1) / len(case.lp)
        answer.lp[t] += kl * (math.exp(d) - 1) / len(case.lp)
    return answer
