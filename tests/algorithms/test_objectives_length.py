"""Length methods and off-policy corrections on mini-batches whose rewards or weights can be computed by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_disco.algorithms import MiniBatch, build_objective

from .cases import HINGE, RATIO, random_case, to_mini_batch
from .reference import Case


def weights(settings: dict[str, Any], case: Case) -> Tensor:
    """The token weights [T] of the objective with these settings."""
    return build_objective(settings)(to_mini_batch(case)).token_weights


def shape_rewards(settings: dict[str, Any], lengths: list[int], correct: list[bool], **fields: Any) -> list[float]:
    """The shaped rewards of the responses to one question, whose rewards were 1 if correct, else 0.

    fields: further fields of MiniBatch.
    """
    tokens = torch.zeros(sum(lengths), dtype=torch.float64)
    batch = MiniBatch(
        tokens,
        tokens,
        torch.tensor(lengths),
        torch.zeros(len(lengths), dtype=torch.int64),
        torch.tensor(correct, dtype=torch.float64),
        16,
        correct=torch.tensor(correct),
        **fields,
    )
    return build_objective(settings).shaped(batch).tolist()


@pytest.fixture
def mixed() -> Case:
    """Six questions of 8 responses, right and wrong."""
    return random_case(31, questions=[q for q in range(6) for _ in range(8)])


@pytest.mark.parametrize(
    ("settings", "base"),
    [
        ({"name": "rloo_lp", "alpha": 0}, "rloo"),
        ({"name": "alp", "beta": 0}, "grpo"),
        ({"name": "hapo", "length_weight": 0}, "grpo"),
    ],
)
def test_without_its_length_term_a_method_is_its_base(settings: dict[str, Any], base: str, mixed: Case) -> None:
    assert weights(settings, mixed).equal(weights({"name": base}, mixed))


def test_hapo_before_any_right_answer_is_grpo(mixed: Case) -> None:
    unset = replace(mixed, shortest=[0] * len(mixed.lengths))
    assert weights({"name": "hapo"}, unset).equal(weights({"name": "grpo"}, mixed))


def test_rloo_lp_takes_more_from_a_longer_right_answer() -> None:
    z = 1 / math.sqrt(2)  # the relative length of the longer of two right answers
    rewards = shape_rewards({"name": "rloo_lp", "alpha": 0.4}, [4, 8, 6], [True, True, False])
    assert rewards == pytest.approx([1 - 0.4 / (1 + math.exp(z)), 1 - 0.4 / (1 + math.exp(-z)), 0.0], rel=1e-6)
    # The only right answer of its question has z = 0.
    assert shape_rewards({"name": "rloo_lp", "alpha": 0.4}, [5, 6], [True, False]) == [0.8, 0.0]


def test_alp_charges_tokens_by_how_easy_the_question_is() -> None:
    alp = {"name": "alp", "beta": 0.01}
    easy = shape_rewards(alp, [4, 8, 6, 2], [True, True, True, False])
    assert easy == pytest.approx([0.97, 0.94, 0.955, -0.015])  # p = 3/4
    unsolved = shape_rewards(alp, [4, 8, 6, 2], [False] * 4)
    assert unsolved == pytest.approx([-0.01, -0.02, -0.015, -0.005])  # 1/K = 1/4


def test_hapo_compares_with_the_shortest_right_answer_of_earlier_steps() -> None:
    hapo = {"name": "hapo", "length_weight": 1.0}
    lengths, right = [4, 8, 16, 4, 12, 16], [True, True, True, False, False, False]  # h/2, h, 2h; h/2, 3h/2, 2h
    rewards = shape_rewards(hapo, lengths, right, columns={"shortest_correct": torch.full((6,), 8)})
    root = math.sqrt(0.5)
    assert rewards == pytest.approx([1 + root, 1.0, 0.3, 0.0, -root, -1.0])


def test_grpo_lead_weighs_hard_questions_more() -> None:
    z = 1 / math.sqrt(2)
    rewards = shape_rewards({"name": "grpo_lead"}, [4, 8, 6], [True, True, False])
    assert rewards == pytest.approx([math.exp(0.05 * z), math.exp(-0.05 * z), -1.0], rel=1e-6)
    case = random_case(36, questions=[0] * 8, lengths=[3] * 8, rewards=[1.0] + [0.0] * 7, spread=0.0)
    ratio = weights({"name": "grpo_lead"}, case) / weights({"name": "grpo"}, case)

    def difficulty_weight(p: float) -> float:
        return 0.4 + 1.1 / (1 + math.exp(10 * (p - 0.75)))

    expected = [difficulty_weight(1 / 8)] * 3 + [difficulty_weight(7 / 8)] * 21
    # Standardized, GRPO-LEAD's rewards 1 and -1 are those of GRPO, 1 and 0, so that only the weight is left.
    assert ratio.tolist() == pytest.approx(expected, rel=1e-5)


def test_the_verdict_and_not_the_reward_says_which_answers_are_right(mixed: Case) -> None:
    doubled = replace(mixed, rewards=[r + 0.9 for r in mixed.rewards], correct=[r > 0.5 for r in mixed.rewards])
    for name in ("rloo_lp", "alp", "grpo_lead"):
        torch.testing.assert_close(weights({"name": name}, doubled), weights({"name": name}, mixed), rtol=1e-9, atol=0)


# Off-policy correction


@pytest.mark.parametrize("kind", ["truncated_importance_sampling", "sequence_mask"])
@pytest.mark.parametrize("settings", [{"name": "disco"} | RATIO, {"name": "grpo"}, {"name": "trpa"}])
def test_where_the_engines_agree_nothing_is_corrected(settings: dict[str, Any], kind: str, mixed: Case) -> None:
    equal = replace(mixed, generation=mixed.old)
    output = build_objective(settings | {"off_policy": {"kind": kind}})(to_mini_batch(equal))
    assert output.token_weights.equal(weights(settings, mixed))
    assert output.metrics["off_policy/factor_mean"] == 1
    assert output.metrics["off_policy/cut"] == 0


def test_a_correction_leaves_value_and_constraint_alone(mixed: Case) -> None:
    case = replace(mixed, generation=[x - 5 for x in mixed.old])
    plain, masked = (
        build_objective({"name": "disco", "constraint": HINGE} | correction)(to_mini_batch(case))
        for correction in ({}, {"off_policy": {"kind": "sequence_mask"}})
    )
    assert masked.loss.equal(plain.loss)
    assert masked.metrics["off_policy/cut"] == 1
    # Every response is masked, so that only the constraint has a gradient, which is equal at every token.
    assert masked.token_weights.unique().numel() == 1 and masked.token_weights[0] < 0


def test_a_response_is_masked_whole_and_kept_whole() -> None:
    case = random_case(37, questions=[0] * 4, lengths=[2] * 4, rewards=[1.0, 1, 0, 0])
    difference = [0.0, 0.0, 0.03, 0.0, -0.03, 0.0, 0.03, -0.03]
    case = replace(case, generation=[x - d for x, d in zip(case.old, difference, strict=True)])
    masked = weights({"name": "disco_b", "constraint": {"kind": "none"}, "off_policy": {"kind": "sequence_mask"}}, case)
    assert (masked != 0).tolist() == [True, True, False, False, False, False, True, True]


def test_a_correction_needs_the_engines_log_probs(mixed: Case) -> None:
    batch = replace(to_mini_batch(mixed), generation_log_probs=None)
    with pytest.raises(ValueError, match="grpo needs the mini-batch's generation_log_probs"):
        build_objective({"name": "grpo", "off_policy": {"kind": "sequence_mask"}})(batch)


def test_drpo_weighs_right_answers_by_any_preference(mixed: Case) -> None:
    short = replace(mixed, preferences=[1 - n / mixed.limit for n in mixed.lengths])
    custom = {"name": "drpo", "preference": "my_rewards:brevity"}
    reverse = replace(short, preferences=[-p for p in short.preferences])
    assert weights(custom, short).equal(weights({"name": "drpo"}, mixed))
    assert not weights(custom, reverse).equal(weights(custom, short))
    with pytest.raises(ValueError, match="drpo needs the mini-batch's preference"):
        build_objective(custom)(replace(to_mini_batch(mixed), columns={}))
