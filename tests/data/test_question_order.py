"""The question order: epochs are complete, no step repeats a question, and the saved position restores it."""

import json
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_disco.data.question_order import QuestionOrder
from nemo_disco.runtime.errors import UserError

sizes = st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n)))
settings.register_profile("quick", max_examples=60, deadline=None)


def take(order, steps):
    return [order.next() for _ in range(steps)]


@settings(settings.get_profile("quick"))
@given(size=sizes, seed=st.integers(0, 3), shuffle=st.booleans())
def test_an_epoch_has_every_question_once_and_no_step_repeats_one(size, seed, shuffle):
    n, per_step = size
    steps = take(QuestionOrder(n, per_step, seed, shuffle), 5 * n)
    assert all(len(step) == len(set(step)) == per_step for step in steps)
    asked = [i for step in steps for i in step]
    epochs = [asked[start : start + n] for start in range(0, len(asked) - n + 1, n)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)


@settings(settings.get_profile("quick"))
@given(size=sizes, steps=st.integers(0, 50), shuffle=st.booleans())
def test_a_resumed_order_continues_where_it_was(size, steps, shuffle):
    order = QuestionOrder(*size, seed=1, shuffle=shuffle)
    take(order, steps)
    state = json.loads(json.dumps(order.state_dict()))
    resumed = QuestionOrder(*size, seed=1, shuffle=shuffle)
    take(resumed, 3)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert take(resumed, 20) == take(order, 20)


def test_without_shuffling_the_order_is_that_of_the_files():
    assert take(QuestionOrder(5, 2, 0, False), 4) == [[0, 1], [2, 3], [4, 0], [1, 2]]


def test_each_epoch_and_seed_has_its_own_order():
    orders = {tuple(QuestionOrder(64, 64, seed, True).next()) for seed in range(20)}
    epochs = take(QuestionOrder(64, 64, 0, True), 20)
    assert len(orders) == 20 and all(a != b for a, b in pairwise(epochs))
    assert tuple(range(64)) not in orders


def test_too_few_questions_are_refused_with_both_numbers():
    with pytest.raises(UserError, match="questions_per_step is 4, but there are 3 questions"):
        QuestionOrder(3, 4, 0, True)


@pytest.mark.parametrize(
    ("other", "complaint"),
    [
        ((7, 2, 0, True), "questions=6, this run has 7"),
        ((6, 3, 0, True), "questions_per_step=2, this run has 3"),
        ((6, 2, 9, True), "seed=0, this run has 9"),
        ((6, 2, 0, False), "shuffle=True, this run has False"),
    ],
)
def test_the_state_of_another_order_is_refused(other, complaint):
    state = QuestionOrder(6, 2, 0, True).state_dict()
    with pytest.raises(UserError, match=complaint):
        QuestionOrder(*other).load_state_dict(state)


def test_a_position_inside_a_step_is_refused_and_changes_nothing():
    order = QuestionOrder(6, 4, 0, True)
    before = order.state_dict()
    with pytest.raises(UserError, match="epoch 0, question 3"):
        order.load_state_dict(before | {"position": 3})
    assert order.state_dict() == before


def test_weights_set_how_often_an_epoch_has_a_question():
    """Ten questions are in an epoch twice, ten once, and ten in every other epoch."""
    weights = [2.0] * 10 + [1.0] * 10 + [0.5] * 10
    order = QuestionOrder(30, 5, 0, True, weights)
    steps = take(order, 14)  # 35 questions an epoch
    assert all(len(set(step)) == 5 for step in steps)
    asked = Counter(i for step in steps for i in step)
    # A question that a step skips comes right after that step, which may be after the end of the second epoch.
    expected = [4] * 10 + [2] * 10 + [1] * 10
    assert sum(abs(asked[i] - n) for i, n in enumerate(expected)) <= 2
    assert order.state_dict() == {
        "epoch": 1, "position": 35, "questions": 30, "questions_per_step": 5, "seed": 0, "shuffle": True,
        "questions_per_epoch": 35,
    }  # fmt: skip


def test_a_weighted_order_resumes():
    weights = [3.0, 1.0, 0.4, 0.4, 1.0, 1.0, 1.0, 0.4]
    order, resumed = (QuestionOrder(8, 2, 1, True, weights) for _ in range(2))
    take(order, 17)
    resumed.load_state_dict(json.loads(json.dumps(order.state_dict())))
    assert take(resumed, 30) == take(order, 30)
    with pytest.raises(UserError, match="questions_per_epoch"):
        QuestionOrder(8, 2, 1, True).load_state_dict({**order.state_dict(), "questions_per_epoch": 9})


@pytest.mark.parametrize("weights", [[100.0, 1.0, 1.0, 1.0], [0.01] * 4])
def test_weights_that_would_repeat_a_question_in_a_step_are_refused(weights):
    with pytest.raises(UserError, match="train_weights"):
        QuestionOrder(4, 2, 0, True, weights)


def test_a_run_does_not_resume_with_changed_questions() -> None:
    state = QuestionOrder(8, 2, 1, True, content="one").state_dict()
    same, other = (QuestionOrder(8, 2, 1, True, content=content) for content in ("one", "two"))
    same.load_state_dict(state)
    with pytest.raises(UserError, match=r"other content.*data\.if_changed=restart"):
        other.load_state_dict(state)
    # An earlier version did not save the content.
    earlier = {key: value for key, value in state.items() if key != "content"}
    other.load_state_dict(earlier)
