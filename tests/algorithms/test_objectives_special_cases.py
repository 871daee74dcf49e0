"""Relations between objectives that the papers state, and errors of the released code that must not occur here."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_disco.algorithms import build_objective

from .cases import HINGE, NONE, RATIO, make_objective, random_case, to_mini_batch
from .reference import Case


def weights(settings: dict[str, Any], case: Case) -> Tensor:
    """The token weights [T] of the objective with these settings; without a constraint unless they have one."""
    return build_objective({"constraint": NONE} | settings)(to_mini_batch(case)).token_weights


@pytest.fixture
def mixed() -> Case:
    """Six questions of 8 responses, right and wrong."""
    return random_case(31, questions=[q for q in range(6) for _ in range(8)])


@pytest.mark.parametrize("score", ["log_likelihood", "likelihood_ratio"])
def test_drpo_at_infinite_lambda_is_disco(mixed: Case, score: str) -> None:
    drpo = weights({"name": "drpo", "lambda": math.inf, "score": score}, mixed)
    disco = weights({"name": "disco", "score": score}, mixed)
    torch.testing.assert_close(drpo, disco, rtol=1e-13, atol=0)


def test_drpo_prefers_short_answers(mixed: Case) -> None:
    case = replace(mixed, lp=mixed.old)
    weight = weights({"name": "drpo", "lambda": 0.5}, case)
    per_response = [-float(weight[list(case.tokens(i))].sum()) for i in range(8)]
    right = sorted((case.lengths[i], -per_response[i]) for i in range(8) if case.is_right(i))
    assert [w for _, w in right] == sorted(w for _, w in right)
    assert right[0][1] < right[-1][1]


@pytest.mark.parametrize("score", ["log_likelihood", "likelihood_ratio"])
def test_disco_at_a_large_tau_is_disco_b(mixed: Case, score: str) -> None:
    disco = weights({"name": "disco", "tau": 1e6, "score": score}, mixed)
    torch.testing.assert_close(disco, weights({"name": "disco_b", "score": score}, mixed), rtol=1e-5, atol=0)


@pytest.mark.parametrize("tau", [1e-3, 0.5, 1.0, 10.0, 1e3])
def test_the_robust_objective_is_below_the_basic_one(mixed: Case, tau: float) -> None:
    robust = make_objective("disco", NONE, tau=tau)(to_mini_batch(mixed)).metrics["objective/value"]
    basic = make_objective("disco_b", NONE)(to_mini_batch(mixed)).metrics["objective/value"]
    assert robust < basic


def test_grpo_on_the_first_mini_batch_is_disco_b_with_a_difficulty_weight(mixed: Case) -> None:
    case = replace(mixed, lp=mixed.old)
    grpo, disco_b = weights({"name": "grpo"}, case), weights({"name": "disco_b"} | RATIO, case)
    weighted = weights({"name": "disco_b", "question_weight": True} | RATIO, case)
    unweighted = weights({"name": "grpo_rw"}, case)
    factor = math.sqrt(7 / 8)  # the biased over the unbiased standard deviation of a group of 8
    for i in range(len(case.lengths)):
        p = sum(case.is_right(j) for j in case.group(case.questions[i])) / 8
        tokens = list(case.tokens(i))
        expected = math.sqrt(p * (1 - p)) * factor * disco_b[tokens]
        torch.testing.assert_close(grpo[tokens], expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(grpo, factor * weighted, rtol=1e-5, atol=0)
    torch.testing.assert_close(unweighted, factor * disco_b, rtol=1e-5, atol=0)


def test_dapo_at_equal_clips_and_lengths_is_grpo() -> None:
    case = random_case(32, questions=[0, 1] * 6, lengths=[5] * 12, spread=0.5)
    dapo = weights({"name": "dapo", "clip_low": 0.2, "clip_high": 0.2}, case)
    torch.testing.assert_close(dapo, weights({"name": "grpo"}, case), rtol=1e-13, atol=1e-18)


def test_wide_clips_are_no_clips(mixed: Case) -> None:
    wide = weights({"name": "disco_b", "clip_low": 0.999999, "clip_high": 1e6} | RATIO, mixed)
    torch.testing.assert_close(wide, weights({"name": "disco_b"} | RATIO, mixed), rtol=1e-13, atol=0)


def test_a_clip_stops_the_gradient_of_tokens_that_have_moved_far_enough() -> None:
    case = random_case(33, questions=[0, 0], lengths=[2, 2], rewards=[1.0, 0.0])
    case = replace(case, lp=[x + d for x, d in zip(case.old, [0.5, 0.1, -0.5, -0.1], strict=True)])
    for settings in ({"name": "grpo"}, {"name": "disco_b", "clip_low": 0.2, "clip_high": 0.2} | RATIO):
        assert (weights(settings, case) != 0).tolist() == [False, True, False, True]


def test_gpg_scales_for_degenerate_groups() -> None:
    useful = random_case(34, questions=[0] * 4, lengths=[3] * 4, rewards=[1.0, 0, 0, 1])
    diluted = random_case(34, questions=[0] * 4 + [1] * 4, lengths=[3] * 8, rewards=[1.0, 0, 0, 1] + [1.0] * 4)
    gpg = weights({"name": "gpg"}, diluted)
    torch.testing.assert_close(gpg[:12], weights({"name": "gpg"}, useful), rtol=1e-13, atol=0)
    assert not gpg[12:].any()


@pytest.mark.parametrize("reward", [0.1, 0.7, 1 / 3])
@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "gpg", "rloo", "grpo_rw"])
def test_equal_rewards_give_exactly_nothing(name: str, reward: float) -> None:
    # Adam would scale a gradient of rounding errors alone up to a full step.
    case = random_case(35, questions=[0] * 7, rewards=[reward] * 7)
    assert not weights({"name": name}, case).any()


def test_right_responses_are_chosen_by_the_verdict_and_not_by_the_shaped_reward(mixed: Case) -> None:
    verdicts = [reward > 0.5 for reward in mixed.rewards]
    shaped = replace(mixed, correct=verdicts, rewards=[r - 0.8 * i / 48 for i, r in enumerate(mixed.rewards)])
    for name in ("disco", "disco_b", "drpo"):
        assert weights({"name": name}, shaped).equal(weights({"name": name}, mixed))
    assert not weights({"name": "grpo"}, shaped).equal(weights({"name": "grpo"}, mixed))


# Errors of the released code. The numbers are those of the list in the project's notes on the algorithms.


@pytest.mark.parametrize("name", ["disco", "disco_b"])
def test_1_the_likelihood_ratio_is_a_score_of_both(name: str, mixed: Case) -> None:
    assert weights({"name": name} | RATIO, mixed).any()


def test_2_the_hinge_is_on_the_kl_of_the_whole_mini_batch() -> None:
    """At KL_hat = 0.8 delta the hinge is not active, though KL_hat of half of the responses is above delta."""
    delta = 0.01
    case = random_case(41, questions=[0] * 8, lengths=[4] * 8)
    kls = [0.2 * delta, 1.4 * delta] * 4
    case = replace(case, lp=[case.old[t] - kls[i] for i in range(8) for t in case.tokens(i)])
    hinged = make_objective("disco_b", HINGE | {"delta": delta})(to_mini_batch(case))
    assert hinged.metrics["policy/kl"] == pytest.approx(0.8 * delta)
    assert hinged.metrics["constraint/active"] == 0
    assert hinged.token_weights.equal(weights({"name": "disco_b"}, case))


def test_2_the_paper_has_twice_the_gradient_of_the_released_code(mixed: Case) -> None:
    free = weights({"name": "disco"}, mixed)
    paper = weights({"name": "disco", "constraint": HINGE}, mixed) - free
    released = weights({"name": "disco", "constraint": HINGE | {"convention": "released_code"}}, mixed) - free
    torch.testing.assert_close(paper, 2 * released, rtol=1e-11, atol=0)
    assert paper.any()


def test_3_groups_are_by_question_and_not_by_position() -> None:
    case = random_case(42, questions=[3, 1, 3, 1, 1, 2], rewards=[1.0, 0, 0, 1, 0, 1])
    together = weights({"name": "disco"}, case)
    for question in (1, 2, 3):
        members = case.group(question)
        alone = random_case(0, questions=[0] * len(members), lengths=[case.lengths[i] for i in members])
        tokens = [t for i in members for t in case.tokens(i)]
        alone = replace(
            alone,
            lp=[case.lp[t] for t in tokens],
            old=[case.old[t] for t in tokens],
            rewards=[case.rewards[i] for i in members],
        )
        torch.testing.assert_close(together[tokens], weights({"name": "disco"}, alone) / 3, rtol=1e-12, atol=1e-18)


def test_4_rewards_that_are_not_0_or_1_have_a_gradient(mixed: Case) -> None:
    case = replace(mixed, rewards=[{1.0: 0.9, 0.0: 0.05}[r] for r in mixed.rewards])
    assert weights({"name": "disco"}, case).equal(weights({"name": "disco"}, mixed))


@pytest.mark.parametrize("name", ["disco", "disco ratio", "drpo", "grpo", "dapo", "trpa"])
def test_5_an_empty_response_is_no_nan(name: str) -> None:
    case = random_case(43, questions=[0] * 5, lengths=[0, 3, 0, 2, 1], rewards=[1.0, 1, 0, 0, 0])
    output = make_objective(name, HINGE)(to_mini_batch(case))
    assert output.loss.isfinite()
    assert output.token_weights.isfinite().all()
    assert output.token_weights.any()


def test_the_reported_value_is_the_true_j() -> None:
    """The released code reports mean(s+) - tau, the value of its gradient trick."""
    case = random_case(44, questions=[0, 0, 0], lengths=[1, 1, 1], rewards=[1.0, 0, 0])
    value = make_objective("disco", HINGE)(to_mini_batch(case)).metrics["objective/value"]
    right, a, b = case.lp
    assert value == pytest.approx(right - 10 * math.log((math.exp(a / 10) + math.exp(b / 10)) / 2), rel=1e-12)


def test_a_group_of_one_has_no_advantage() -> None:
    """The released code uses the reward itself as the advantage of a group of one."""
    case = random_case(45, questions=[0, 1, 2], rewards=[1.0, 0, 1])
    for name in ("grpo", "grpo_rw", "dr_grpo", "dapo", "gpg", "rloo"):
        assert not weights({"name": name}, case).any()
