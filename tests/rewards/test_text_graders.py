"""The graders that compare text: exact match, a number, a multiple choice."""

from __future__ import annotations

import pytest

from nemo_disco.rewards.text_graders import ExactMatch, MultipleChoice, NumericMatch, TextGrader

CASES: list[tuple[type[TextGrader], str, str | list[str], float]] = [
    (ExactMatch, r"</think> It is \boxed{New  York}.", "New York", 1.0),
    (ExactMatch, "</think> New York\n", "New York", 1.0),
    (ExactMatch, "</think> new york", "New York", 0.0),
    (ExactMatch, "</think> 0.5", ["1/2", "0.5"], 1.0),
    (ExactMatch, "Berlin </think> Paris", "Berlin", 0.0),
    (NumericMatch, "#### 1,234", "1234", 1.0),
    (NumericMatch, "so 3 apples and 4 pears make 7.", "7", 1.0),
    (NumericMatch, "so 3 apples and 4 pears make 7.", "4", 0.0),
    (NumericMatch, r"\boxed{\frac{1}{2}} and then 9", "0.5", 1.0),
    (NumericMatch, "50%", "0.5", 1.0),
    (NumericMatch, "-2.5e3", "-2500", 1.0),
    (NumericMatch, "0.3333333333", "1/3", 1.0),
    (NumericMatch, "0.333", "1/3", 0.0),
    (NumericMatch, "none", "1", 0.0),
    (NumericMatch, "3-5", "-5", 0.0),
    (NumericMatch, "3-5", "5", 1.0),
    (NumericMatch, "on 2024-05-17", "-17", 0.0),
    (NumericMatch, "x=-5", "-5", 1.0),
    (NumericMatch, "it is \N{MINUS SIGN}5.", "-5", 1.0),
    (NumericMatch, "3 - -5", "-5", 1.0),
    (NumericMatch, "GPT-4", "-4", 0.0),
    (MultipleChoice, r"\boxed{A or C}", "A", 0.0),
    (MultipleChoice, r"\boxed{A, C}", "A", 0.0),
    (MultipleChoice, r"\boxed{(A) and (C)}", "A", 0.0),
    (MultipleChoice, r"\boxed{A/C}", "A", 0.0),
    (MultipleChoice, r"\boxed{\text{A or C}}", "A", 0.0),
    (MultipleChoice, "The answer is A or C.", "A", 0.0),
    (MultipleChoice, "A. B. C. D", "A", 0.0),
    (MultipleChoice, r"\boxed{A. B. C. D}", "A", 0.0),
    (MultipleChoice, r"\boxed{(A)(B)}", "A", 0.0),
    (MultipleChoice, "The answer is A. B. C. D.", "A", 0.0),
    (MultipleChoice, "A. Paris\nB. London", "A", 0.0),
    (MultipleChoice, r"\boxed{(A) Paris or (B) London}", "A", 0.0),
    (MultipleChoice, r"\boxed{C. J. K. Rowling}", "C", 1.0),
    (MultipleChoice, "C. It is blue, so (A) and (B) are wrong.", "C", 1.0),
    (MultipleChoice, r"\boxed{\text{(C) Paris}}", "C", 1.0),
    (MultipleChoice, r"\boxed{\textbf{C}}", "C", 1.0),
    (MultipleChoice, r"\boxed{C. Paris}", "C", 1.0),
    (MultipleChoice, r"\boxed{$C$}", "C", 1.0),
    (MultipleChoice, "I choose C", "C", 1.0),
    (MultipleChoice, "I choose C", "I", 0.0),
    (MultipleChoice, "I'd go with (D).", "D", 1.0),
    (MultipleChoice, "I pick option B because it fits.", "B", 1.0),
    (MultipleChoice, "C is correct.", "C", 1.0),
    (MultipleChoice, "**C**", "C", 1.0),
    (MultipleChoice, "The answer is a number", "A", 0.0),
    (MultipleChoice, "The answer is A cat", "A", 0.0),
    (MultipleChoice, "A cat", "A", 0.0),
    (MultipleChoice, "I think so", "I", 0.0),
    (MultipleChoice, r"\boxed{C}", "C", 1.0),
    (MultipleChoice, r"\boxed{\text{(c)}}", "(C)", 1.0),
    (MultipleChoice, "A or B? The answer is (B).", "B", 1.0),
    (MultipleChoice, "A or B? The answer is **A**.", "B", 0.0),
    (MultipleChoice, "B", "B) Berlin", 1.0),
    (MultipleChoice, "Berlin of course", "B", 0.0),
]


@pytest.mark.parametrize(("kind", "response", "gold", "reward"), CASES)
def test_verdicts(kind: type[TextGrader], response: str, gold: str | list[str], reward: float) -> None:
    with kind() as grader:
        [verdict] = grader.grade_with_reasons([response], [gold])
    assert verdict.reward == reward and (verdict.reason == "correct") == (reward == 1.0)


WRONG = {ExactMatch: "wrong", NumericMatch: "wrong", MultipleChoice: "no choice"}


@pytest.mark.parametrize("kind", WRONG)
def test_thinking_may_be_required(kind: type[TextGrader]) -> None:
    grader = kind(require_think=True)
    assert [v.reason for v in grader.grade_with_reasons(["7", "</think> 7 "], ["7", "8"])] == [
        "no </think>",
        WRONG[kind],
    ]


@pytest.mark.parametrize(("tolerance", "reward"), [(0.0, 0.0), (0.01, 1.0)])
def test_a_tolerance_is_a_share_of_the_answer(tolerance: float, reward: float) -> None:
    assert NumericMatch(tolerance=tolerance).grade(["99.5"], ["100"]) == [reward]
