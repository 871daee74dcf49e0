"""The length methods and the off-policy corrections: what they come to where it can be said by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_disco.algorithms import MiniBatch, build_objective

from .cases import HINGE, RATIO, batch_of, random_case
from .reference import Case


def weights(given: dict[str, Any], case: Case) -> Tensor:
    return build_objective(given)(batch_of(case)).token_weights


def shaped(given: dict[str, Any], lengths: list[int], correct: list[bool], **more: Any) -> list[float]:
    """The rewards that the objective sees, of one question's responses."""
    tokens = torch.zeros(sum(lengths), dtype=torch.float64)
    batch = MiniBatch(
        tokens,
        tokens,
        torch.tensor(lengths),
        torch.zeros(len(lengths), dtype=torch.int64),
        torch.tensor(correct, dtype=torch.float64),
        16,
        correct=torch.tensor(correct),
        **more,
    )
    return build_objective(given).shaped(batch).tolist()


@pytest.fixture
def mixed() -> Case:
    return random_case(31, questions=[q for q in range(6) for _ in range(8)])


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ({"name": "rloo_lp", "alpha": 0}, "rloo"),
        ({"name": "alp", "beta": 0}, "grpo"),
        ({"name": "hapo", "length_weight": 0}, "grpo"),
    ],
)
def test_without_its_length_term_a_method_is_its_base(given: dict[str, Any], plain: str, mixed: Case) -> None:
    assert weights(given, mixed).equal(weights({"name": plain}, mixed))


def test_hapo_before_any_right_answer_is_grpo(mixed: Case) -> None:
    unset = replace(mixed, shortest=[0] * len(mixed.lengths))
    assert weights({"name": "hapo"}, unset).equal(weights({"name": "grpo"}, mixed))


def test_rloo_lp_takes_more_from_a_longer_right_answer() -> None:
    z = 1 / math.sqrt(2)  # of two lengths, one on each side of their mean
    got = shaped({"name": "rloo_lp", "alpha": 0.4}, [4, 8, 6], [True, True, False])
    wanted = [1 - 0.4 / (1 + math.exp(z)), 1 - 0.4 / (1 + math.exp(-z)), 0.0]
    assert got == pytest.approx(wanted, rel=1e-6)
    assert shaped({"name": "rloo_lp", "alpha": 0.4}, [5, 6], [True, False]) == [0.8, 0.0]  # alone: z = 0


def test_alp_charges_tokens_by_how_easy_the_question_is() -> None:
    alp = {"name": "alp", "beta": 0.01}
    assert shaped(alp, [4, 8, 6, 2], [True, True, True, False]) == pytest.approx([0.97, 0.94, 0.955, -0.015])
    assert shaped(alp, [4, 8, 6, 2], [False] * 4) == pytest.approx([-0.01, -0.02, -0.015, -0.005])  # 1/K


def test_hapo_compares_with_the_shortest_right_answer_of_before() -> None:
    hapo = {"name": "hapo", "length_weight": 1.0}
    right = [True, True, True, False, False, False]
    got = shaped(hapo, [4, 8, 16, 4, 12, 16], right, columns={"shortest_correct": torch.full((6,), 8)})
    root = math.sqrt(0.5)  # half of h, h, twice h and, wrong, half, 1.5 and 2 h
    assert got == pytest.approx([1 + root, 1.0, 0.3, 0.0, -root, -1.0])


def test_grpo_lead_weighs_hard_questions_more() -> None:
    z = 1 / math.sqrt(2)
    got = shaped({"name": "grpo_lead"}, [4, 8, 6], [True, True, False])
    assert got == pytest.approx([math.exp(0.05 * z), math.exp(-0.05 * z), -1.0], rel=1e-6)
    case = random_case(36, questions=[0] * 8, lengths=[3] * 8, rewards=[1.0] + [0.0] * 7, spread=0.0)
    ratio = weights({"name": "grpo_lead"}, case) / weights({"name": "grpo"}, case)

    def w(p: float) -> float:
        return 0.4 + 1.1 / (1 + math.exp(10 * (p - 0.75)))

    wanted = [w(1 / 8)] * 3 + [w(7 / 8)] * 21
    assert ratio.tolist() == pytest.approx(wanted, rel=1e-5)  # rewards 1 and -1 standardise to those of 1 and 0


def test_the_verdict_and_not_the_reward_says_which_answers_are_right(mixed: Case) -> None:
    doubled = replace(mixed, rewards=[r + 0.9 for r in mixed.rewards], correct=[r > 0.5 for r in mixed.rewards])
    for name in ("rloo_lp", "alp", "grpo_lead"):
        torch.testing.assert_close(weights({"name": name}, doubled), weights({"name": name}, mixed), rtol=1e-9, atol=0)


# Off-policy correction


@pytest.mark.parametrize("kind", ["truncated_importance_sampling", "sequence_mask"])
@pytest.mark.parametrize("given", [{"name": "disco"} | RATIO, {"name": "grpo"}, {"name": "trpa"}])
def test_where_the_engines_agree_nothing_is_corrected(given: dict[str, Any], kind: str, mixed: Case) -> None:
    same = replace(mixed, generation=mixed.old)
    output = build_objective(given | {"off_policy": {"kind": kind}})(batch_of(same))
    assert output.token_weights.equal(weights(given, mixed))
    assert output.metrics["off_policy/factor_mean"] == 1
    assert output.metrics["off_policy/cut"] == 0


def test_a_correction_leaves_value_and_constraint_alone(mixed: Case) -> None:
    case = replace(mixed, generation=[x - 5 for x in mixed.old])
    plain, masked = (
        build_objective({"name": "disco", "constraint": HINGE} | more)(batch_of(case))
        for more in ({}, {"off_policy": {"kind": "sequence_mask"}})
    )
    assert masked.loss.equal(plain.loss)
    assert masked.metrics["off_policy/cut"] == 1
    # Of a mini-batch that is masked whole, the constraint is left: the same pull at every token.
    assert masked.token_weights.unique().numel() == 1 and masked.token_weights[0] < 0


def test_a_response_is_masked_whole_and_kept_whole() -> None:
    case = random_case(37, questions=[0] * 4, lengths=[2] * 4, rewards=[1.0, 1, 0, 0])
    away = [0.0, 0.0, 0.03, 0.0, -0.03, 0.0, 0.03, -0.03]
    case = replace(case, generation=[x - d for x, d in zip(case.old, away, strict=True)])
    masked = weights({"name": "disco_b", "constraint": {"kind": "none"}, "off_policy": {"kind": "sequence_mask"}}, case)
    assert (masked != 0).tolist() == [True, True, False, False, False, False, True, True]


def test_a_correction_needs_the_engines_log_probs(mixed: Case) -> None:
    batch = replace(batch_of(mixed), generation_log_probs=None)
    with pytest.raises(ValueError, match="grpo needs the mini-batch's generation_log_probs"):
        build_objective({"name": "grpo", "off_policy": {"kind": "sequence_mask"}})(batch)


def test_drpo_weighs_right_answers_by_any_preference(mixed: Case) -> None:
    short = replace(mixed, preferences=[1 - n / mixed.limit for n in mixed.lengths])
    own = {"name": "drpo", "preference": "my_rewards:brevity"}
    assert weights(own, short).equal(weights({"name": "drpo"}, mixed))
    assert not weights(own, replace(short, preferences=[-p for p in short.preferences])).equal(weights(own, short))
    with pytest.raises(ValueError, match="drpo needs the mini-batch's preference"):
        build_objective(own)(replace(batch_of(mixed), columns={}))
