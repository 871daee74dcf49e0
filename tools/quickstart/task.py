"""The quickstart's task: sums and differences as short stories, worked digit by digit, with verifiable answers.

Pure and seeded: the same seed gives the same questions anywhere. No question is in two splits, whatever its wording.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

SUM_STORIES = (
    "What is {a} + {b}?",
    "Find the sum of {a} and {b}.",
    "A farm has {a} hens and buys {b} more. How many hens are there now?",
    "Mia read {a} pages in May and {b} in June. How many pages in total?",
    "A train carries {a} people and {b} more get on. How many are on it?",
)
DIFFERENCE_STORIES = (
    "What is {a} - {b}?",
    "Subtract {b} from {a}.",
    "A shop had {a} pens and sold {b}. How many pens are left?",
    "Leo has {a} coins and Ana has {b}. How many more coins does Leo have?",
    "A tank holds {a} litres and {b} are used. How many litres remain?",
)
MIN_DIGITS, MAX_DIGITS = 2, 3


@dataclass(frozen=True)
class Problem:
    """One question: a + b or a - b (a >= b), told as one of the stories."""

    a: int
    b: int
    sign: str
    story: str

    @property
    def key(self) -> tuple[int, int, str]:
        """What makes two questions the same: the calculation, in either order, however it is worded."""
        return (max(self.a, self.b), min(self.a, self.b), self.sign)

    @property
    def question(self) -> str:
        return self.story.format(a=self.a, b=self.b)

    @property
    def answer(self) -> str:
        return str(self.a + self.b if self.sign == "+" else self.a - self.b)

    @property
    def solution(self) -> str:
        """A worked response, as it follows the generation prompt (which ends inside <think>)."""
        return "\n".join(_columns(self)) + f"\n</think>\n\\boxed{{{self.answer}}}"

    def row(self) -> dict[str, str]:
        """The question as the data files hold it."""
        return {"problem": self.question, "answer": self.answer}


def _columns(problem: Problem) -> list[str]:
    """One line a decimal place, ones first: 7+6=13 then 4+8+1=13; 13-6=7 (borrowed) then 2-1=1."""
    lines, carry = [], 0
    for place in range(len(str(problem.a))):
        x, y = (n // 10**place % 10 for n in (problem.a, problem.b))
        if problem.sign == "+":
            total = x + y + carry
            lines.append(f"{x}+{y}{'+1' if carry else ''}={total}")
            carry = total // 10
        else:
            x -= carry
            carry = int(x < y)
            lines.append(f"{x + 10 * carry}-{y}={x + 10 * carry - y}")
    return lines


def stream(seed: int) -> Iterator[Problem]:
    """Problems without end, no two with the same key."""
    rng = random.Random(seed)
    seen: set[tuple[int, int, str]] = set()
    while True:
        sign = rng.choice("+-")
        a, b = (rng.randrange(10 ** (d - 1), 10**d) for d in _digits(rng))
        a, b = max(a, b), min(a, b)
        problem = Problem(a, b, sign, rng.choice(SUM_STORIES if sign == "+" else DIFFERENCE_STORIES))
        if problem.key not in seen:
            seen.add(problem.key)
            yield problem


def _digits(rng: random.Random) -> tuple[int, int]:
    return MAX_DIGITS, rng.randint(MIN_DIGITS, MAX_DIGITS)
