"""The study's task: sums of one-digit numbers, worked in steps that may be skipped (shorter, riskier) or repeated.

Pure and seeded. The worked solutions mix styles, so that a warm-started policy has a length to choose: skipping is what
length methods push to, spelling out is what accuracy pays for. The files' format is the product's.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from tools.quickstart import task

FEWEST_NUMBERS, MOST_NUMBERS = 3, 5
SMALLEST, LARGEST = 2, 9
SKIP = 0.25  # the chance that a step adds two numbers at once
REPEAT = 0.3  # the chance that the last step is written twice


@dataclass(frozen=True)
class Problem(task.Problem):
    """A sum and one of the ways to work it, drawn by `style`."""

    style: int = 0

    @property
    def question(self) -> str:
        return "+".join(map(str, self.numbers))

    @property
    def solution(self) -> str:
        rng = random.Random(self.style)
        total, rest, lines = self.numbers[0], list(self.numbers[1:]), []
        while rest:
            count = 2 if len(rest) > 1 and rng.random() < SKIP else 1
            terms, rest = rest[:count], rest[count:]
            lines.append(f"{'+'.join(map(str, [total, *terms]))}={total + sum(terms)}")
            total += sum(terms)
        if rng.random() < REPEAT:
            lines.append(lines[-1])
        return "\n".join([*lines, "</think>", f"\\boxed{{{self.answer}}}"])


def stream(seed: int) -> Iterator[Problem]:
    """Problems without end."""
    rng = random.Random(seed)
    while True:
        count = rng.randint(FEWEST_NUMBERS, MOST_NUMBERS)
        yield Problem(tuple(rng.randint(SMALLEST, LARGEST) for _ in range(count)), "", rng.getrandbits(32))


def distinct(problems: Iterator[Problem]) -> Iterator[Problem]:
    """The problems, without those whose numbers came before in the same order."""
    seen: set[tuple[int, ...]] = set()
    for problem in problems:
        if problem.numbers not in seen:
            seen.add(problem.numbers)
            yield problem
