"""Groups responses by their answers for maj@k, the majority vote of k responses.

Compares text and exact numbers only: two answers that are equal by algebra alone get different votes.
"""

from __future__ import annotations

from nemo_disco.rewards.extract import END_OF_THINKING, extract_box_or
from nemo_disco.rewards.math.canonical import canonicalize
from nemo_disco.rewards.math.fast_path import parse_numeral
from nemo_disco.rewards.math.grader import MAX_ANSWER
from nemo_disco.rewards.math.units import split_unit
from nemo_disco.rewards.math.words import squeeze


def answer_key(response: str) -> str | None:
    """A text that equal answers share: of the last box after the thinking, else of the last line; None if it is empty
    or longer than MAX_ANSWER."""
    text = response.rpartition(END_OF_THINKING)[2]
    answer = extract_box_or(text, (text.strip().splitlines() or [""])[-1])
    if not answer.strip() or len(answer) > MAX_ANSWER:
        return None
    quantity = split_unit(canonicalize(answer))
    number = parse_numeral(quantity.body)
    if number is None:
        return f"{squeeze(quantity.body)} {quantity.unit}"
    return f"{number.value}{'%' if number.percent else ''} {quantity.unit}"


def assign_votes(responses: list[str]) -> list[int]:
    """Number the answers of responses to one question: equal numbers for equal answers, -1 for no answer."""
    numbers: dict[str, int] = {}
    keys = [answer_key(response) for response in responses]
    return [-1 if key is None else numbers.setdefault(key, len(numbers)) for key in keys]
