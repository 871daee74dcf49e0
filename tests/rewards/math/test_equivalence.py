"""The grader on tables of equal and unequal answers, on several boxes, and on several gold answers."""

from __future__ import annotations

import pytest
from answer_table import DIFFERENT, EQUAL
from fault_table import KINDS
from fault_table_more import MORE_KINDS

from nemo_disco.rewards import MathGrader


def box(answer: str) -> str:
    return rf"Let us see.</think> So the answer is \boxed{{{answer}}}."


@pytest.mark.parametrize(("gold", "answers"), EQUAL, ids=[gold for gold, _ in EQUAL])
def test_equal(grader: MathGrader, gold: str, answers: list[str]) -> None:
    verdicts = grader.grade_with_reasons([box(answer) for answer in [gold, *answers]], [gold] * (len(answers) + 1))
    assert [
        a for a, v in zip([gold, *answers], verdicts, strict=True) if (v.reward, v.reason) != (1.0, "correct")
    ] == []


@pytest.mark.parametrize(("gold", "answers"), DIFFERENT, ids=[gold for gold, _ in DIFFERENT])
def test_different(grader: MathGrader, gold: str, answers: list[str]) -> None:
    verdicts = grader.grade_with_reasons([box(answer) for answer in answers], [gold] * len(answers))
    assert [
        a for a, v in zip(answers, verdicts, strict=True) if v.reward or v.reason not in ("wrong", "unparsable answer")
    ] == []


@pytest.mark.parametrize("kind", KINDS | MORE_KINDS)
def test_each_kind_of_fault_is_mended(grader: MathGrader, kind: str) -> None:
    for pairs, reward in zip((KINDS | MORE_KINDS)[kind], (1.0, 0.0), strict=True):
        verdicts = grader.grade_with_reasons([box(answer) for answer, _ in pairs], [gold for _, gold in pairs])
        misgraded = [(pair, v.reason) for pair, v in zip(pairs, verdicts, strict=True) if v.reward != reward]
        assert misgraded == [], f"reward should be {reward}"
        assert "timeout" not in [v.reason for v in verdicts]


def test_an_answer_may_equal_any_of_several_gold_answers(grader: MathGrader) -> None:
    golds = ["0.01\n", r"\sqrt{3}"]
    assert grader.grade([box("0.01"), box(r"\frac{3}{\sqrt{3}}"), box("0.02")], [golds, tuple(golds), golds]) == [
        1.0,
        1.0,
        0.0,
    ]


def test_an_approximation_without_numbers_does_not_hide_the_other_gold_answers(grader: MathGrader) -> None:
    answer, golds = r"x \approx 2y \approx 3y", ["2y", r"x \approx 2y \approx 3y + 0"]
    verdicts = grader.grade_with_reasons([box(answer)] * 2, [golds[:1], golds])
    assert [v.reason for v in verdicts] == ["wrong", "correct"]


def test_the_last_box_counts(grader: MathGrader) -> None:
    assert grader.grade([r"\boxed{1} \boxed{2}", r"\boxed{2} \boxed{1}"], ["2", "2"]) == [1.0, 0.0]


def test_a_gold_answer_may_be_boxed(grader: MathGrader) -> None:
    assert grader.grade([box("5")], [r"It is $\boxed{5}$"]) == [1.0]


@pytest.mark.parametrize(
    ("gold", "reason"), [("", "unparsable gold answer"), ("@#", "unparsable gold answer"), ("7", "wrong")]
)
def test_the_reason_tells_a_bad_gold_answer_from_a_wrong_answer(grader: MathGrader, gold: str, reason: str) -> None:
    assert [v.reason for v in grader.grade_with_reasons([box("x+1")], [gold])] == [reason]
