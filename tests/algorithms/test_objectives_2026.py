"""Relations that the papers of GSPO, CISPO, SAPO, DPPO, its successor, MaxRL and ConSPO state, and cases by hand."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_disco.algorithms import MiniBatch, build_objective
from nemo_disco.algorithms.objectives.importance import binary_divergence
from nemo_disco.commands.components import build_run_objective
from nemo_disco.config.compose import compose
from nemo_disco.data.rollouts import Rollouts
from nemo_disco.rollout.rewarding import compute_column

from .cases import random_case, to_mini_batch
from .reference import Case

UNLIMITED = {"clip_low": 0.999999, "clip_high": 1e9}


def weights(settings: dict[str, Any], case: Case) -> Tensor:
    """The token weights [T] of the objective with these settings."""
    return build_objective(settings)(to_mini_batch(case)).token_weights


@pytest.fixture
def mixed() -> Case:
    """Six questions of 8 responses, right and wrong."""
    return random_case(31, questions=[q for q in range(6) for _ in range(8)], spread=0.5)


def single_tokens(probabilities: list[float], old: list[float], rewards: list[float]) -> Case:
    """Responses of one token to one question, with these probabilities under the policy and under old."""
    case = random_case(1, questions=[0] * len(old), lengths=[1] * len(old), rewards=rewards)
    return replace(case, lp=[math.log(p) for p in probabilities], old=[math.log(p) for p in old])


# GSPO, CISPO, SAPO


def test_gspo_of_one_token_is_grpo() -> None:
    case = random_case(91, questions=[0, 1] * 8, lengths=[1] * 16, spread=0.5)
    clips = {"clip_low": 0.2, "clip_high": 0.28}
    gspo, grpo = weights({"name": "gspo"} | clips, case), weights({"name": "grpo"} | clips, case)
    torch.testing.assert_close(gspo, grpo, rtol=1e-13, atol=0)
    assert (gspo == 0).any() and (gspo != 0).any()


def test_gspo_keeps_or_drops_a_response_as_a_whole() -> None:
    case = random_case(92, questions=[0, 0, 0], lengths=[2, 2, 2], rewards=[1.0, 1.0, 0.0])
    changes = [0.5, -0.5, 0.5, -0.4, 0.0, 0.0]  # the means of the responses: 0, 0.05, 0
    case = replace(case, lp=[x + d for x, d in zip(case.old, changes, strict=True)])
    assert (weights({"name": "gspo"}, case) != 0).tolist() == [True, True, False, False, True, True]
    assert (weights({"name": "grpo"}, case) != 0).tolist() == [False, True, False, True, True, True]


def test_cispo_where_nothing_has_moved_is_reinforce(mixed: Case) -> None:
    case = replace(mixed, lp=mixed.old)
    reinforce = weights({"name": "dapo"} | UNLIMITED, case)
    torch.testing.assert_close(weights({"name": "cispo"}, case), reinforce, rtol=1e-13, atol=0)


def test_cispo_bounds_a_tokens_gradient_and_never_drops_it() -> None:
    case = single_tokens([0.9, 0.02, 0.5], [0.1, 0.2, 0.5], [1.0, 0.0, 0.0])
    unmoved = weights({"name": "cispo"}, replace(case, lp=case.old))
    assert (weights({"name": "cispo"}, case) / unmoved).tolist() == pytest.approx([5.0, 0.1, 1.0])
    assert (weights({"name": "cispo", "clip_high": 0.5}, case) / unmoved).tolist() == pytest.approx([1.5, 0.1, 1.0])


def test_sapo_where_nothing_has_moved_has_the_gradient_of_the_plain_ratio(mixed: Case) -> None:
    case = replace(mixed, lp=mixed.old)
    plain = weights({"name": "grpo"} | UNLIMITED, case)
    for temperatures in ({}, {"tau_positive": 0.3, "tau_negative": 7.0}):
        torch.testing.assert_close(weights({"name": "sapo"} | temperatures, case), plain, rtol=1e-13, atol=0)


def test_sapo_attenuates_more_where_the_advantage_is_negative() -> None:
    rho = 1.5
    case = single_tokens([0.3 * rho, 0.3 * rho], [0.3, 0.3], [1.0, 0.0])
    ratio = weights({"name": "sapo"}, case) / weights({"name": "grpo"} | UNLIMITED, case)

    def attenuation(tau: float) -> float:
        p = 1 / (1 + math.exp(-tau * (rho - 1)))
        return 4 * p * (1 - p)

    assert ratio.tolist() == pytest.approx([attenuation(1.0), attenuation(1.05)])
    assert ratio[1] < ratio[0] < 1


# DPPO and its successor


@pytest.mark.parametrize("divergence", ["total_variation", "kl"])
def test_dppo_without_a_limit_is_dr_grpo_without_a_clip(divergence: str, mixed: Case) -> None:
    dppo = {"name": "dppo", "divergence": divergence}
    plain = weights({"name": "dr_grpo"} | UNLIMITED, mixed)
    torch.testing.assert_close(weights(dppo | {"divergence_limit": math.inf}, mixed), plain, rtol=1e-13, atol=0)
    limited = weights(dppo | {"divergence_limit": 0.02}, mixed)
    assert (limited == 0).any()
    torch.testing.assert_close(limited, plain.where(limited != 0, 0.0), rtol=1e-13, atol=0)


def test_dppo_masks_by_the_probability_that_moved_and_not_by_the_ratio() -> None:
    # A rare token of ratio 100, a common one of ratio 1.4 and one of 0.7; right ones were pushed up, wrong ones down.
    moved = single_tokens([0.01, 0.7, 0.36, 0.1], [0.0001, 0.5, 0.5, 0.09], [1.0, 1.0, 0.0, 0.0])
    assert (weights({"name": "dppo"}, moved) != 0).tolist() == [True, False, True, True]
    assert (weights({"name": "dppo", "divergence_limit": 0.1}, moved) != 0).tolist() == [True, False, False, True]
    # Moved as far, but the other way than the advantage pushes: never masked.
    back = replace(moved, rewards=[0.0, 0.0, 1.0, 1.0])
    assert (weights({"name": "dppo", "divergence_limit": 0.0}, back) != 0).tolist() == [True, True, True, False]


@pytest.mark.parametrize("kind", ["total_variation", "kl"])
def test_a_binary_divergence_is_that_of_two_outcomes_and_below_that_of_all(kind: str) -> None:
    generator = torch.Generator().manual_seed(6)
    old, new = torch.randn(2, 7, dtype=torch.float64, generator=generator).softmax(1)
    by_token = binary_divergence(kind, new.log(), old.log())
    for o, n, divergence in zip(old.tolist(), new.tolist(), by_token.tolist(), strict=True):
        pairs = [(o, n), (1 - o, 1 - n)]
        two = sum(a * math.log(a / b) for a, b in pairs) if kind == "kl" else sum(abs(a - b) for a, b in pairs) / 2
        assert divergence == pytest.approx(two)
    whole = (old * (old / new).log()).sum() if kind == "kl" else (old - new).abs().sum() / 2
    assert by_token.max() <= whole


def test_a_probability_of_one_is_no_nan() -> None:
    zero, half = torch.zeros(1, dtype=torch.float64), torch.full((1,), math.log(0.5), dtype=torch.float64)
    assert binary_divergence("kl", zero, zero).item() == 0
    assert binary_divergence("kl", half, zero).item() == pytest.approx(math.log(2))
    assert binary_divergence("kl", zero, half).item() == math.inf
    assert binary_divergence("kl", zero + 1e-7, zero).item() == 0


def test_the_regularised_gradient_is_zero_at_the_limit_and_turns_beyond_it() -> None:
    old = [0.5] * 5
    moved = single_tokens([0.5, 0.6, 0.65, 0.7, 0.4], old, [1.0, 1.0, 1.0, 1.0, 0.0])
    plain = weights({"name": "dr_grpo"} | UNLIMITED, moved)
    regularised = weights({"name": "divergence_regularized", "divergence_limit": 0.15}, moved)
    assert (regularised / plain).tolist() == pytest.approx([1.0, 1 / 3, 0.0, -1 / 3, 1 / 3], abs=1e-12)
    unlimited = weights({"name": "divergence_regularized", "divergence_limit": math.inf}, moved)
    torch.testing.assert_close(unlimited, plain, rtol=1e-13, atol=0)
    # The authors' limit keeps the gradient within 8% of the plain ratio's.
    assert (weights({"name": "divergence_regularized"}, moved) / plain - 1).abs().max() < 0.08


# MaxRL


def test_maxrl_divides_by_the_groups_mean() -> None:
    case = random_case(93, questions=[0] * 4 + [1] * 4 + [2], lengths=[1] * 9, rewards=[1.0] + [0.0] * 7 + [1.0])
    advantage = -9 * weights({"name": "maxrl"}, replace(case, lp=case.old))
    assert advantage.tolist() == pytest.approx([3, -1, -1, -1, 0, 0, 0, 0, 0])


@pytest.mark.parametrize("rewards", [[-1.0, 0.0, 0.5], [0.1, 0.2, -0.3], [0.0, 0.0, 0.0]])
def test_maxrl_has_no_advantage_where_the_mean_reward_is_not_positive(rewards: list[float]) -> None:
    case = random_case(94, questions=[0, 0, 0], rewards=rewards)
    assert not weights({"name": "maxrl"}, case).any()


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_maxrl_is_the_gradient_of_the_first_terms_of_the_log_likelihood(size: int) -> None:
    """By enumeration of all groups of responses of one token, of which the first token is right."""
    logits = torch.tensor([-1.0, 0.3, 0.8], dtype=torch.float64, requires_grad=True)
    log_p = logits.log_softmax(0)
    wrong = 1 - log_p[0].exp()
    terms = sum((-(wrong**k) / k for k in range(1, size)), 0 * wrong)
    (true,) = torch.autograd.grad(terms, logits)
    by_logits = torch.eye(3, dtype=torch.float64) - log_p.detach().exp()
    expected = torch.zeros(3, dtype=torch.float64)
    for group in itertools.product(range(3), repeat=size):
        tokens = torch.tensor(group)
        ones = torch.ones(size, dtype=torch.int64)
        sampled = log_p.detach()[tokens]
        batch = MiniBatch(sampled, sampled, ones, 0 * ones, (tokens == 0).double(), 1)
        gradient = -build_objective({"name": "maxrl"})(batch).token_weights @ by_logits[tokens]
        expected += sampled.sum().exp() * gradient
    torch.testing.assert_close(expected, true, rtol=0, atol=1e-13)


# ConSPO


def test_conspo_of_one_right_and_one_wrong_response_is_the_logistic_loss() -> None:
    case = random_case(95, questions=[0, 0], lengths=[3, 5], rewards=[1.0, 0.0])
    output = build_objective({"name": "conspo", "tau": 0.5, "margin": 0})(to_mini_batch(case))
    right, wrong = (sum(case.lp[t] for t in case.tokens(i)) / case.lengths[i] for i in (0, 1))
    lead = (right - wrong) / 0.5
    assert output.metrics["objective/value"] == pytest.approx(-0.5 * math.log1p(math.exp(-lead)), rel=1e-12)
    share = 1 / (1 + math.exp(lead))
    assert output.token_weights.tolist() == pytest.approx([-share / 3] * 3 + [share / 5] * 5, rel=1e-12)


def test_conspo_presses_most_on_the_wrong_response_with_the_highest_score(mixed: Case) -> None:
    case = random_case(96, questions=[0] * 4, lengths=[1] * 4, rewards=[1.0, 0, 0, 0])
    case = replace(case, lp=[-2.0, -1.0, -2.0, -3.0])
    gradient = weights({"name": "conspo", "tau": 1.0}, case)
    assert (gradient[1] / gradient[2]).item() == pytest.approx(math.e)
    assert (gradient[2] / gradient[3]).item() == pytest.approx(math.e)
    for settings in ({}, {"tau": 0.1, "margin": 2.0}):  # what right responses gain, wrong ones lose
        per_response = weights({"name": "conspo"} | settings, mixed)
        assert per_response.sum().abs() < 1e-12 < per_response.abs().sum()


def test_a_large_tau_leaves_the_contrast_of_the_means(mixed: Case) -> None:
    """Then each of n wrong responses has 1 / (n + 1) of the pressure, and so has each right one."""
    conspo = weights({"name": "conspo", "tau": 1e9, "margin": 0}, mixed)
    disco_b = weights({"name": "disco_b", "constraint": {"kind": "none"}}, mixed)
    for q in range(6):
        members = mixed.group(q)
        wrong = sum(not mixed.is_right(i) for i in members)
        tokens = [t for i in members for t in mixed.tokens(i)]
        torch.testing.assert_close(conspo[tokens], disco_b[tokens] * wrong / (wrong + 1), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("step", "margin"), [(0, 0.0), (25, 0.2 * (1 - math.sqrt(0.5)) / 2), (50, 0.1), (100, 0.2), (700, 0.2)]
)
def test_the_margin_rises_over_the_first_steps_and_then_stays(step: int, margin: float, mixed: Case) -> None:
    rising = {"name": "conspo", "tau": 1.0, "margin": 0.2, "margin_steps": 100}
    fixed = {"name": "conspo", "tau": 1.0, "margin": margin, "margin_steps": 0}
    case = replace(mixed, step=step)
    torch.testing.assert_close(weights(rising, case), weights(fixed, case), rtol=1e-12, atol=1e-17)


def test_the_progress_is_the_version_of_the_weights_that_sampled() -> None:
    objective = build_run_objective(compose("quickstart", ["algorithm=conspo"]))
    [signal] = objective.signals()
    rollouts = Rollouts.pack([[1]] * 3, [[2]] * 3, [[0.0]] * 3, [7, 8, 7], [False] * 3, weight_versions=[5, 5, 4])
    assert compute_column(signal, rollouts).tolist() == [5, 5, 4]
    assert signal.state_dict() == {}
    for unscheduled in ("algorithm.margin=0", "algorithm.margin_steps=0"):
        objective = build_run_objective(compose("quickstart", ["algorithm=conspo", unscheduled]))
        assert objective.signals() == [] and objective.needs == frozenset()
    with pytest.raises(ValueError, match="conspo needs the mini-batch's completed_steps"):
        build_objective({"name": "conspo"})(replace(to_mini_batch(random_case(97)), columns={}))


@pytest.mark.parametrize("name", ["gspo", "cispo", "sapo", "dppo", "divergence_regularized", "maxrl", "conspo"])
def test_equal_rewards_and_groups_of_one_give_exactly_nothing(name: str) -> None:
    for case in (random_case(98, questions=[0] * 7, rewards=[0.7] * 7), random_case(99, questions=[0, 1, 2])):
        assert not weights({"name": name}, case).any()
