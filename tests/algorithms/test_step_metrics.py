"""Metrics of a step's groups, and of all questions of a run so far."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nemo_disco.algorithms.solved_questions import SolvedQuestions
from nemo_disco.algorithms.step_metrics import group_metrics
from nemo_disco.data.rollouts import Rollouts


def graded(verdicts: dict[int, str]) -> Rollouts:
    """Rollouts of one-token responses; verdicts: by question, + for a right response and - for a wrong one."""
    ids = [question for question, text in verdicts.items() for _ in text]
    rollouts = Rollouts.pack([[1]] * len(ids), [[2]] * len(ids), [[-1.0]] * len(ids), ids, [False] * len(ids))
    return replace(rollouts, correct=torch.tensor([c == "+" for text in verdicts.values() for c in text]))


def test_shares_of_groups_and_pass_at_k() -> None:
    metrics = group_metrics(graded({7: "++++", 3: "----", 5: "+---", 9: "+-"}))
    assert {name: metrics[f"groups/{name}"] for name in ("mixed", "all_wrong", "all_right")} == {
        "mixed": 0.5,
        "all_wrong": 0.25,
        "all_right": 0.25,
    }
    assert metrics["groups/pass@2"] == pytest.approx((1 + 0 + 0.5 + 1) / 4)
    assert metrics["groups/pass@4"] == pytest.approx((1 + 0 + 1) / 3), "a group of two has no pass@4"
    assert "groups/pass@8" not in metrics


def test_a_question_is_solved_for_good_and_a_checkpoint_knows_it() -> None:
    questions = SolvedQuestions()
    assert questions.update(graded({1: "+-", 2: "--"})) == {"groups/never_solved": 0.5}
    assert questions.update(graded({1: "--", 3: "--"}))["groups/never_solved"] == pytest.approx(2 / 3)
    resumed = SolvedQuestions()
    resumed.load_state_dict(questions.state_dict())
    for each in (questions, resumed):
        assert each.update(graded({2: "+-"}))["groups/never_solved"] == pytest.approx(1 / 3)
    empty = SolvedQuestions()
    empty.load_state_dict({})
    assert empty.state_dict() == SolvedQuestions().state_dict()
