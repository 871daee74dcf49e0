"""The quickstart's task: sums of a few small numbers in short stories, with a solution in steps and one answer.

Pure and seeded: a seed gives the same questions on every machine. The numbers of a held-out question are not in
training, in any order or wording.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

STORIES = (
    "What is {sum}?",
    "Find {sum}.",
    "Mia scores {list} points. What is her total?",
    "A bus picks up {list} people. How many is that?",
    "Boxes hold {list} pens. How many pens in all?",
)
FEWEST_NUMBERS, MOST_NUMBERS = 4, 6  # more numbers are harder: an error in any step spoils the answer
SMALLEST, LARGEST = 2, 9


@dataclass(frozen=True)
class Problem:
    """One question: the sum of the numbers, in the words of one of the stories."""

    numbers: tuple[int, ...]
    story: str

    @property
    def key(self) -> tuple[int, ...]:
        """The numbers in ascending order; a held-out question shares its key with no training question."""
        return tuple(sorted(self.numbers))

    @property
    def question(self) -> str:
        words = [str(n) for n in self.numbers]
        return self.story.format(sum=" + ".join(words), list=f"{', '.join(words[:-1])} and {words[-1]}")

    @property
    def answer(self) -> str:
        return str(sum(self.numbers))

    @property
    def solution(self) -> str:
        """A right response in steps, to follow the generation prompt (which ends inside <think>)."""
        total, lines = self.numbers[0], []
        for n in self.numbers[1:]:
            lines.append(f"{total}+{n}={total + n}")
            total += n
        return "\n".join([*lines, "</think>", f"\\boxed{{{self.answer}}}"])

    def row(self) -> dict[str, str]:
        """The question as a line of a question file."""
        return {"problem": self.question, "answer": self.answer}


def stream(seed: int) -> Iterator[Problem]:
    """Endless problems, no two with the same numbers in the same order."""
    rng = random.Random(seed)
    seen: set[tuple[int, ...]] = set()
    while True:
        count = rng.randint(FEWEST_NUMBERS, MOST_NUMBERS)
        problem = Problem(tuple(rng.randint(SMALLEST, LARGEST) for _ in range(count)), rng.choice(STORIES))
        if problem.numbers not in seen:
            seen.add(problem.numbers)
            yield problem


def hold_out(problems: Iterator[Problem], count: int) -> list[Problem]:
    """The next `count` problems, no two with the same numbers in any order."""
    held_out: dict[tuple[int, ...], Problem] = {}
    while len(held_out) < count:
        problem = next(problems)
        held_out.setdefault(problem.key, problem)
    return list(held_out.values())


def exclude(problems: Iterator[Problem], held_out: list[Problem]) -> Iterator[Problem]:
    """The problems whose numbers are those of no held-out problem, in any order."""
    keys = {p.key for p in held_out}
    return (p for p in problems if p.key not in keys)


def check_held_out(held_out: list[Problem], training: list[Problem]) -> None:
    """Raise ValueError if a training problem has the numbers of a held-out problem, in any order."""
    shared = {p.key for p in held_out} & {p.key for p in training}
    if shared:
        raise ValueError(f"{len(shared)} held-out problems are in training, such as {min(shared)}")


def take(problems: Iterator[Problem], count: int) -> list[Problem]:
    return list(islice(problems, count))
