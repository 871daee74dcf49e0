"""Which answers vote together in maj@k: a key for each response, equal where the answers are plainly the same.

Pure string work, as the fast path of grading: what only algebra could tell apart or together votes apart.
"""

from __future__ import annotations

from nemo_disco.rewards.extract import END_OF_THINKING, NoAnswerError, boxed
from nemo_disco.rewards.math.canonical import canonical
from nemo_disco.rewards.math.fast_path import numeral
from nemo_disco.rewards.math.grader import MAX_ANSWER
from nemo_disco.rewards.math.units import quantity
from nemo_disco.rewards.math.words import squeezed


def answer_key(response: str) -> str | None:
    """The key of the last box after the thinking; without a box, of the last line said; None if nothing is said."""
    said = response.rpartition(END_OF_THINKING)[2]
    try:
        answer = boxed(said)
    except NoAnswerError:
        answer = (said.strip().splitlines() or [""])[-1]
    if not answer.strip() or len(answer) > MAX_ANSWER:
        return None
    plain = quantity(canonical(answer))
    number = numeral(plain.body)
    if number is None:
        return f"{squeezed(plain.body)} {plain.unit}"
    return f"{number.value}{'%' if number.percent else ''} {plain.unit}"


def votes(responses: list[str]) -> list[int]:
    """Of one problem: a number for each response, equal where the keys are, -1 where there is none."""
    numbers: dict[str, int] = {}
    keys = [answer_key(response) for response in responses]
    return [-1 if key is None else numbers.setdefault(key, len(numbers)) for key in keys]
