"""Independent float64 reference of the objectives: the papers' formulas as loops over floats, with gradients by hand.

Group statistics are exact fractions. Shares nothing with nemo_disco.algorithms, not even torch. Notation, as in the
papers: o a response of |o| tokens to a question q; S+, S- the right and the wrong responses to q that are not empty;
rho_t = exp(lp_t - old_t); N responses, T tokens and |B| questions in the mini-batch; C the maximum response length.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction


@dataclass
class Case:
    """One mini-batch as plain lists.

    [T], one number for each response token: lp, old, reference, generation, its log-prob under the current policy, the
    policy that sampled, the frozen reference and the engine; entropies, of the current policy; divergences, the KL of
    the policy that sampled to the current one at each token's place.
    [N], one for each response: lengths |o|; questions, any integers; rewards r; preferences, DRPO's r(o); shortest,
    HAPO's h; correct, the grader's verdicts (None: a response is right if its reward is above the threshold).
    limit: C. step: training steps before the one that sampled the responses.
    """

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
    divergences: list[float] = field(default_factory=list)
    preferences: list[float] = field(default_factory=list)
    shortest: list[int] = field(default_factory=list)
    step: int = 40

    def tokens(self, i: int) -> range:
        """Positions of response i's tokens among the T tokens."""
        start = sum(self.lengths[:i])
        return range(start, start + self.lengths[i])

    def group(self, question: int) -> list[int]:
        """Positions of the question's responses among the N responses."""
        return [i for i, q in enumerate(self.questions) if q == question]

    def is_right(self, i: int) -> bool:
        return self.rewards[i] > self.threshold if self.correct is None else self.correct[i]


@dataclass
class ExpectedOutput:
    """An objective's value J and its gradient; after `add_penalty` also KL_hat and the loss, whose gradient it then is.

    token_gradient, entropy_gradient, divergence_gradient [T]: the derivatives with respect to each token's lp, entropy
    and divergence. k1: the mean of old_t - lp_t, whatever estimator KL_hat is.
    """

    case: Case
    value: float = 0.0
    token_gradient: list[float] = field(default_factory=list)
    entropy_gradient: list[float] = field(default_factory=list)
    divergence_gradient: list[float] = field(default_factory=list)
    loss: float = 0.0
    kl: float = 0.0
    k1: float = 0.0

    def __post_init__(self) -> None:
        self.token_gradient = [0.0] * len(self.case.lp)
        self.entropy_gradient = [0.0] * len(self.case.lp)

    def add_penalty(self, kind: str, beta: float, delta: float, convention: str, estimator: str, **_: object) -> None:
        """Set loss = penalty(KL_hat) - J, and replace J's gradient by the loss's (arXiv 2505.12366, Algorithm 1).

        KL_hat = (1/T) sum_t of old_t - lp_t (k1), of rho_t - 1 - log rho_t (k3), or of the divergences (top_k). The
        penalty is beta max(KL_hat - delta, 0)^2 (squared_hinge; in the convention of the released code
        beta max(KL_hat - delta, 0) KL_hat with the first factor held constant), or beta KL_hat (kl_regularization,
        dual), or 0 (none).
        """
        total = max(len(self.case.lp), 1)
        differences = [x - o for o, x in zip(self.case.old, self.case.lp, strict=True)]
        self.k1 = -math.fsum(differences) / total
        terms = {
            "k1": [(-d, -1.0, 0.0) for d in differences],  # (value, derivative in lp, derivative in the divergence)
            "k3": [(math.expm1(d) - d, math.expm1(d), 0.0) for d in differences],
            "top_k": [(kl, 0.0, 1.0) for kl in self.case.divergences],
        }[estimator]
        self.kl = math.fsum(value for value, _, _ in terms) / total
        penalty = slope = 0.0
        if kind in ("kl_regularization", "dual"):
            penalty, slope = beta * self.kl, beta
        elif kind == "squared_hinge" and self.kl > delta:
            excess = self.kl - delta
            if convention == "paper":
                penalty, slope = beta * excess * excess, 2 * beta * excess
            else:
                penalty, slope = beta * excess * self.kl, beta * excess
        self.loss = penalty - self.value
        self.token_gradient = [
            slope * by_lp / total - g for g, (_, by_lp, _) in zip(self.token_gradient, terms, strict=True)
        ]
        self.divergence_gradient = [slope * by_divergence / total for _, _, by_divergence in terms]
        self.entropy_gradient = [-g for g in self.entropy_gradient]


# Scores and their means (arXiv 2505.12366)


def token_score(score: str, lp: float, old: float) -> tuple[float, float]:
    """(score of one token, its derivative in lp): lp_t or rho_t (arXiv 2505.12366, section 4.1)."""
    return (lp, 1.0) if score == "log_likelihood" else (math.exp(lp - old), math.exp(lp - old))


def response_score(case: Case, score: str, i: int) -> float:
    """s(o, q) of response i, the mean of its tokens' scores (arXiv 2505.12366, section 4.1)."""
    return math.fsum(token_score(score, case.lp[t], case.old[t])[0] for t in case.tokens(i)) / case.lengths[i]


def plain_mean(scores: list[float]) -> tuple[float, list[float]]:
    """(mean s, its derivative in each s): the term of S- in DisCO-b (arXiv 2505.12366)."""
    return math.fsum(scores) / len(scores), [1 / len(scores)] * len(scores)


def log_mean_exp(scores: list[float], tau: float) -> tuple[float, list[float]]:
    """(tau log mean exp(s / tau), its derivative in each s): the term of S- in DisCO (arXiv 2505.12366)."""
    top = max(scores)
    exps = [math.exp((s - top) / tau) for s in scores]
    total = math.fsum(exps)
    return top + tau * math.log(total / len(scores)), [e / total for e in exps]


# DisCO-b, DisCO (arXiv 2505.12366), DRPO (arXiv 2510.04474)


def contrast_scores(
    case: Case, score: str, right_weights: Callable, wrong_mean: Callable, question_weight: bool
) -> ExpectedOutput:
    """J = (1/|B|) sum_q d_q [sum_{S+} w_o s(o) - D(S-)], over the questions that have both S+ and S-.

    right_weights(S+): the weights w_o. wrong_mean(scores of S-): D and its derivatives in the scores. d_q is 1, or with
    question_weight sqrt(p (1 - p)), where p = |S+| / (|S+| + |S-|).
    """
    output = ExpectedOutput(case)
    questions = sorted(set(case.questions))
    for q in questions:
        scored = [i for i in case.group(q) if case.lengths[i]]
        right, wrong = [i for i in scored if case.is_right(i)], [i for i in scored if not case.is_right(i)]
        if not right or not wrong:
            continue
        p = len(right) / len(scored)
        scale = (math.sqrt(p * (1 - p)) if question_weight else 1.0) / len(questions)
        weights = right_weights(right)
        negative, wrong_weights = wrong_mean([response_score(case, score, i) for i in wrong])
        positive = math.fsum(w * response_score(case, score, i) for w, i in zip(weights, right, strict=True))
        output.value += scale * (positive - negative)
        coefficients = list(zip(right, weights, strict=True)) + [
            (i, -w) for i, w in zip(wrong, wrong_weights, strict=True)
        ]
        for i, w in coefficients:
            for t in case.tokens(i):
                derivative = token_score(score, case.lp[t], case.old[t])[1]
                output.token_gradient[t] = scale * w * derivative / case.lengths[i]
    return output


def disco_b(case: Case, score: str = "log_likelihood", question_weight: bool = False) -> ExpectedOutput:
    """DisCO-b: J1 = (1/|B|) sum_q [mean_{S+} s - mean_{S-} s] (arXiv 2505.12366).

    question_weight: the paper's ablation, which multiplies each question's term by sqrt(p (1 - p)).
    """
    return contrast_scores(case, score, lambda right: [1 / len(right)] * len(right), plain_mean, question_weight)


def disco(case: Case, score: str = "log_likelihood", tau: float | None = None) -> ExpectedOutput:
    """DisCO: J2 = (1/|B|) sum_q [mean_{S+} s - tau log mean_{S-} exp(s / tau)] (arXiv 2505.12366, Algorithm 1).

    Computed as DRPO at lambda = infinity, where the weights of S+ are equal. tau: by default the authors', 10 for
    log_likelihood and 1 for likelihood_ratio.
    """
    return drpo(case, score, tau, math.inf)


def drpo(
    case: Case,
    score: str = "log_likelihood",
    tau: float | None = None,
    lambda_: float = 0.1,
    custom_preference: bool = False,
) -> ExpectedOutput:
    """DRPO: J = (1/|B|) sum_q [sum_{S+} w_o s(o) - tau log mean_{S-} exp(s / tau)] (arXiv 2510.04474).

    w = softmax over S+ of r(o) / lambda, with r(o) = 1 - |o|/C, or `case.preferences` with custom_preference.
    """
    tau = tau or {"log_likelihood": 10.0, "likelihood_ratio": 1.0}[score]

    def right_weights(right: list[int]) -> list[float]:
        preferences = [
            (case.preferences[i] if custom_preference else 1 - case.lengths[i] / case.limit) / lambda_ for i in right
        ]
        exps = [math.exp(r - max(preferences)) for r in preferences]
        return [e / math.fsum(exps) for e in exps]

    return contrast_scores(case, score, right_weights, lambda scores: log_mean_exp(scores, tau), False)


def disco_b_clipped(case: Case, low: float, high: float) -> ExpectedOutput:
    """DisCO-b with clipped ratios: (1/|B|) sum_q [mean_{S+} f+ - mean_{S-} f-] (arXiv 2505.12366, Proposition 1).

    f+ and f- are a response's token means of min(rho, 1 + high) and of max(rho, 1 - low). Computed as PPO's clipped
    term with the advantage 1/|S+| or -1/|S-|.
    """
    output = ExpectedOutput(case)
    questions = sorted(set(case.questions))
    for q in questions:
        scored = [i for i in case.group(q) if case.lengths[i]]
        right = [i for i in scored if case.is_right(i)]
        if not 0 < len(right) < len(scored):
            continue
        for i in scored:
            advantage = 1 / len(right) if case.is_right(i) else -1 / (len(scored) - len(right))
            weight = advantage / len(questions) / case.lengths[i]
            for t in case.tokens(i):
                value, slope = clipped_term(weight, case.lp[t], case.old[t], low, high)
                output.value += value
                output.token_gradient[t] = slope
    return output


# Advantages of response i, from the rewards r of its group


def center_reward(case: Case, i: int) -> tuple[float, float]:
    """(r_i - mean of the group's rewards, their unbiased standard deviation, which is 0 for a group of one)."""
    rewards = [Fraction(case.rewards[j]) for j in case.group(case.questions[i])]
    mean = sum(rewards) / len(rewards)
    variance = sum((r - mean) ** 2 for r in rewards) / max(len(rewards) - 1, 1)
    return float(Fraction(case.rewards[i]) - mean), math.sqrt(float(variance))


def grpo_advantage(case: Case, i: int) -> float:
    """GRPO: A_i = (r_i - mean) / (std + 1e-6) (arXiv 2402.03300)."""
    difference, std = center_reward(case, i)
    return difference / (std + 1e-6)


def grpo_rw_advantage(case: Case, i: int) -> float:
    """GRPO_RW: GRPO's A_i / sqrt(p (1 - p)), 0 where p is 0 or 1 (ablation of arXiv 2505.12366).

    p: the share of the group's responses, empty ones included, that are right.
    """
    verdicts = [case.is_right(j) for j in case.group(case.questions[i])]
    p = sum(verdicts) / len(verdicts)
    return grpo_advantage(case, i) / math.sqrt(p * (1 - p)) if 0 < p < 1 else 0.0


def rloo_advantage(case: Case, i: int) -> float:
    """RLOO: A_i = r_i - mean of the rewards of the group's other responses, 0 for a group of one (arXiv 2402.14740)."""
    others = [Fraction(case.rewards[j]) for j in case.group(case.questions[i]) if j != i]
    return float(Fraction(case.rewards[i]) - sum(others) / len(others)) if others else 0.0


def gpg_advantage(case: Case, i: int) -> float:
    """GPG: A_i = alpha (r_i - mean), alpha = N / (N - M), 0 if M = N (arXiv 2504.02546).

    M: the number of responses in degenerate groups, those whose rewards are all equal.
    """
    n = len(case.rewards)
    degenerate = sum(len({case.rewards[k] for k in case.group(case.questions[j])}) == 1 for j in range(n))
    return n / (n - degenerate) * center_reward(case, i)[0] if degenerate < n else 0.0


# Policy gradients


def clipped_term(advantage: float, lp: float, old: float, low: float, high: float) -> tuple[float, float]:
    """(min(rho A, clip(rho, 1 - low, 1 + high) A), its derivative in lp): a token's term in GRPO (arXiv 2402.03300)."""
    rho = math.exp(lp - old)
    bounded = min(max(rho, 1 - low), 1 + high)
    if rho * advantage <= bounded * advantage:
        return rho * advantage, rho * advantage
    return bounded * advantage, 0.0


def sum_clipped_terms(
    case: Case, advantage: Callable, divisor: Callable, low: float = 0.2, high: float = 0.2
) -> ExpectedOutput:
    """J = sum_o (1/divisor(|o|)) sum_t min(rho_t A_o, clip(rho_t, 1 - low, 1 + high) A_o), A_o = advantage(case, o)."""
    output = ExpectedOutput(case)
    for i in range(len(case.lengths)):
        a = advantage(case, i)
        for t in case.tokens(i):
            value, slope = clipped_term(a, case.lp[t], case.old[t], low, high)
            output.value += value / divisor(case.lengths[i])
            output.token_gradient[t] = slope / divisor(case.lengths[i])
    return output


def reference_kl_term(estimator: str, lp: float, old: float, reference: float) -> tuple[float, float]:
    """(a token's term of KL(policy || reference), its derivative in lp).

    With d = reference - lp and rho = exp(lp - old): rho (exp(d) - d - 1) (k3_weighted, arXiv 2512.02556), d^2 / 2 (k2),
    exp(d) - d - 1 (k3, Schulman's).
    """
    d, rho = reference - lp, math.exp(lp - old)
    return {
        "k3_weighted": (rho * (math.expm1(d) - d), -rho * d),
        "k2": (d * d / 2, -d),
        "k3": (math.expm1(d) - d, -math.expm1(d)),
    }[estimator]


def grpo(
    case: Case,
    advantage: Callable = grpo_advantage,
    kl: float = 0.0,
    entropy: float = 0.0,
    estimator: str = "k3_weighted",
    **clip: float,
) -> ExpectedOutput:
    """GRPO: J = (1/N) sum_o (1/|o|) sum_t min(rho A, clip(rho) A) - kl KL + entropy H (arXiv 2402.03300).

    KL = (1/T) sum_t reference_kl_term, and H = (1/T) sum_t of the entropies. entropy > 0 is GRPO-ER (baseline of
    arXiv 2505.12366). RLOO and GRPO_RW differ in the advantage alone.
    """
    output = sum_clipped_terms(case, advantage, lambda length: len(case.lengths) * length, **clip)
    total = len(case.lp)
    for t in range(total):
        value, slope = reference_kl_term(estimator, case.lp[t], case.old[t], case.reference[t]) if kl else (0.0, 0.0)
        output.value += (entropy * case.entropies[t] - kl * value) / total
        output.token_gradient[t] -= kl * slope / total
        output.entropy_gradient[t] = entropy / total
    return output


def dr_grpo(case: Case) -> ExpectedOutput:
    """Dr. GRPO: J = (1/N) sum_o (1/C) sum_t min(rho A, clip(rho) A), A = r - mean (arXiv 2503.20783)."""
    return sum_clipped_terms(case, lambda c, i: center_reward(c, i)[0], lambda _: len(case.lengths) * case.limit)


def dapo(case: Case) -> ExpectedOutput:
    """DAPO: J = (1/T) sum_o sum_t min(rho A, clip(rho, 0.8, 1.28) A), A as in GRPO (arXiv 2503.14476)."""
    return sum_clipped_terms(case, grpo_advantage, lambda _: len(case.lp), 0.2, 0.28)


def gpg(case: Case) -> ExpectedOutput:
    """GPG: J = (1/N) sum_o (1/|o|) sum_t lp_t A (arXiv 2504.02546)."""
    output = ExpectedOutput(case)
    for i, length in enumerate(case.lengths):
        for t in case.tokens(i):
            output.token_gradient[t] = gpg_advantage(case, i) / len(case.lengths) / length
            output.value += output.token_gradient[t] * case.lp[t]
    return output


# Pairwise preferences


def trpa(case: Case, beta: float = 0.1, kl: float = 1e-3) -> ExpectedOutput:
    """TRPA: J = mean over pairs of log sigmoid(beta [rise(better) - rise(worse)]) - kl KL (arXiv 2504.04524).

    rise(o) = (1/|o|) sum_t (lp_t - old_t). Pairs: all pairs of non-empty responses to one question with different
    rewards. KL = (1/T) sum_t [exp(d) - d - 1], d = old_t - lp_t (Schulman's k3).
    """
    output = ExpectedOutput(case)
    scored = [i for i, length in enumerate(case.lengths) if length]
    rise = {i: math.fsum(case.lp[t] - case.old[t] for t in case.tokens(i)) / case.lengths[i] for i in scored}
    pairs = [
        (i, j)
        for i in scored
        for j in scored
        if case.questions[i] == case.questions[j] and case.rewards[i] > case.rewards[j]
    ]
    for i, j in pairs:
        margin = beta * (rise[i] - rise[j])
        output.value += (min(margin, 0.0) - math.log1p(math.exp(-abs(margin)))) / len(pairs)
        # sigmoid(-margin), the derivative of log sigmoid(margin), without overflow for either sign
        slope = 1 / (1 + math.exp(margin)) if margin < 0 else math.exp(-margin) / (1 + math.exp(-margin))
        for k, sign in ((i, 1), (j, -1)):
            for t in case.tokens(k):
                output.token_gradient[t] += sign * slope * beta / case.lengths[k] / len(pairs)
    for t in range(len(case.lp)):
        d = case.old[t] - case.lp[t]
        output.value -= kl * (math.exp(d) - d - 1) / len(case.lp)
        output.token_gradient[t] += kl * (math.exp(d) - 1) / len(case.lp)
    return output
