"""MiniBatch refuses invalid fields by name, and groups responses by question into a table."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_disco.algorithms import MiniBatch, NonFiniteError
from nemo_disco.algorithms.objectives.mini_batch import Groups

from .cases import HINGE, OBJECTIVES, make_objective, random_case, to_mini_batch


def build_mini_batch(**changes: Any) -> MiniBatch:
    """A mini-batch of 3 responses with 1, 0 and 2 tokens, after changes of its fields."""
    fields: dict[str, Any] = {
        "log_probs": torch.tensor([-1.0, -2.0, -3.0]),
        "old_log_probs": torch.tensor([-1.0, -2.0, -3.0]),
        "lengths": torch.tensor([1, 0, 2]),
        "question_ids": torch.tensor([7, 7, 8]),
        "rewards": torch.tensor([0.0, 1.0, 1.0]),
        "max_response_length": 4,
    }
    return MiniBatch(**(fields | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": torch.tensor([0.0, math.nan, 1.0])}, r"reward of response 1 \(question 7\) is nan"),
        ({"rewards": torch.tensor([0.0, 1.0, math.inf])}, r"reward of response 2 \(question 8\) is inf"),
        ({"rewards": torch.tensor([0.0, 1.0])}, r"rewards has shape \[2\], but there are 3 lengths"),
        ({"old_log_probs": torch.zeros(2)}, r"old_log_probs has shape \[2\], but there are 3 log_probs"),
        ({"log_probs": torch.zeros(3, 1)}, r"log_probs has shape \[3, 1\]"),
        ({"entropies": torch.zeros(4)}, r"entropies has shape \[4\]"),
        ({"lengths": torch.tensor([1, 1, 2])}, r"lengths add up to 4, not to the 3 log_probs"),
        ({"lengths": torch.tensor([3, -1, 1])}, r"response 1 has length -1"),
        ({"lengths": torch.tensor([1.0, 0.0, 2.0])}, r"lengths must be integers"),
        ({"correct": torch.tensor([0.0, 1.0, 1.0])}, r"correct must be bool"),
        ({"log_probs": torch.tensor([1, 2, 3])}, r"log_probs must be floating point"),
        ({"question_ids": torch.tensor([True, False, True])}, r"question_ids must be integers"),
        ({"rewards": [0.0, 1.0, 1.0]}, r"rewards must be a tensor; it is a list"),
        ({"max_response_length": 0}, r"max_response_length is 0"),
        (
            dict.fromkeys(("lengths", "question_ids"), torch.tensor([], dtype=torch.int64))
            | dict.fromkeys(("log_probs", "old_log_probs", "rewards"), torch.tensor([])),
            r"no responses",
        ),
    ],
)
def test_a_field_that_does_not_fit_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_mini_batch(**changes)


@pytest.mark.parametrize("field", ["log_probs", "old_log_probs", "reference_log_probs", "entropies"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_log_prob_that_is_not_finite_is_refused_by_name(field: str, bad: float) -> None:
    message = rf"{field} is {bad} at token 2 \(number 1 of response 2, question 8\)"
    with pytest.raises(NonFiniteError, match=message):
        build_mini_batch(**{field: torch.tensor([-1.0, -2.0, bad])})


def test_an_engines_log_prob_may_be_minus_infinity() -> None:
    assert build_mini_batch(generation_log_probs=torch.tensor([-1.0, -2.0, -math.inf])).n_tokens == 3


def test_an_overflowing_ratio_is_an_error_and_never_a_weight() -> None:
    batch = build_mini_batch(log_probs=torch.tensor([-1.0, -2.0, 900.0]), question_ids=torch.tensor([7, 7, 7]))
    with pytest.raises(NonFiniteError, match=r"moved most, by 903, is token 2 \(number 1 of response 2"):
        make_objective("disco ratio", HINGE)(batch)


def test_groups_are_a_table_whatever_the_order() -> None:
    groups = Groups.from_question_ids(torch.tensor([9, -1, 9, 4, -1, 9]))
    assert len(groups) == 3
    assert groups.present.tolist() == [[True, True, False], [True, False, False], [True, True, True]]
    values = torch.arange(1.0, 7.0)
    assert groups.table(values).tolist() == [[2, 5, 0], [4, 0, 0], [1, 3, 6]]
    assert groups.flat(groups.table(values)).equal(values)


def test_token_means_and_the_spreading_of_values_over_tokens() -> None:
    batch = build_mini_batch()
    assert batch.token_mean(batch.log_probs).tolist() == [-1.0, 0.0, -2.5]
    assert batch.spread(torch.tensor([5, 6, 7])).tolist() == [5, 7, 7]


def test_ids_and_lengths_of_any_integer_type() -> None:
    case = random_case(71, questions=[3, 1, 3, 1])
    batch = to_mini_batch(case)
    narrow = MiniBatch(
        batch.log_probs, batch.old_log_probs, batch.lengths.int(), batch.question_ids.int(), batch.rewards.int(), 16
    )
    objective = make_objective("grpo", HINGE)
    assert objective(batch).token_weights.equal(objective(narrow).token_weights)


class CountOperations(TorchDispatchMode):
    """Counts the torch operations that run within the `with` block."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_loop_over_tokens_responses_or_questions(name: str) -> None:
    objective, counts = make_objective(name, HINGE), []
    for groups, length in ((2, 3), (32, 50)):
        questions = list(range(groups)) * 4
        rewards = [1.0] * groups + [0.0] * 3 * groups
        batch = to_mini_batch(random_case(72, questions=questions, lengths=[length] * 4 * groups, rewards=rewards))
        with CountOperations() as operations:
            objective(batch)
        counts.append(operations.count)
    assert counts[0] == counts[1] > 0
