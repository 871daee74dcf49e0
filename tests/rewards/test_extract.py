"""The final answer is the response's last box: a box in the thinking, or before a later box, earns nothing."""

from __future__ import annotations

import pytest

from nemo_disco.rewards.extract import NoAnswerError, extract_answer


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"so \boxed{5}", "5"),
        (r"\boxed{5} no, \boxed{6}.", "6"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\left\{1,2\right\}}", r"\left\{1,2\right\}"),
        (r"\boxed{\{x : x > 0\}} as asked", r"\{x : x > 0\}"),
        (r"\boxed{\}}", r"\}"),
        (r"\boxed {5}", "5"),
        ("\\boxed{1\n2}", "1\n2"),
        (r"\boxed{5}. It is in \boxed as you wished", "5"),
        (r"\boxed{a \boxed{b}}", "b"),
        (r"<think>\boxed{1}</think>\boxed{2}", "2"),
    ],
)
def test_last_box(response: str, answer: str) -> None:
    assert extract_answer(response, require_think=False) == answer


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        ("5", "no boxed answer"),
        ("", "no boxed answer"),
        (r"\boxed 5", "no boxed answer"),
        (r"\boxed{1}</think> so it is 1", "no boxed answer"),
        (r"\boxed{1} \boxed{\frac{1}{2}", "unclosed boxed answer"),
        (r"\boxed{5} as in \boxed{ }", "empty boxed answer"),
    ],
)
def test_no_answer(response: str, reason: str) -> None:
    with pytest.raises(NoAnswerError, match=reason):
        extract_answer(response, require_think=False)


def test_the_end_of_thinking_may_be_required() -> None:
    assert extract_answer(r"thoughts</think> \boxed{7}", require_think=True) == "7"
    with pytest.raises(NoAnswerError, match="no </think>"):
        extract_answer(r"thoughts \boxed{7}", require_think=True)


@pytest.mark.parametrize("piece", [r"\boxed", r"\boxed{", "{", r"\boxed  ", "\\", "}"])
def test_a_megabyte_is_scanned_in_linear_time(piece: str) -> None:
    """A quadratic scan would take minutes."""
    with pytest.raises(NoAnswerError):
        extract_answer(piece * (1_000_000 // len(piece)), require_think=False)
