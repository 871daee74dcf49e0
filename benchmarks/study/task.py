"""The study's task: sums of one-digit numbers, worked in steps that may be skipped (shorter, riskier) or repeated.

Pure and seeded. The worked solutions mix styles, so that a warm-started policy can be shorter or longer: length methods
favour skipped steps, and accuracy favours steps that are written out. Question files have the format of nemo_disco.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from tools.quickstart import task

SMALLEST, LARGEST = 2, 9


@dataclass(frozen=True)
class TaskSettings:
    """How many numbers a sum has, and in which styles its worked solutions are written.

    skip: the chance that a step adds two numbers at once. repeat_each: the chance of each step to be written twice.
    repeat_last: the chance that the last step is written once more.
    """

    fewest_numbers: int = 3
    most_numbers: int = 5
    skip: float = 0.25
    repeat_each: float = 0.0
    repeat_last: float = 0.3


@dataclass(frozen=True)
class Problem(task.Problem):
    """A sum of one-digit numbers and a worked solution, whose style is drawn at random from the seed `style`."""

    style: int = 0
    settings: TaskSettings = TaskSettings()

    @property
    def question(self) -> str:
        return "+".join(map(str, self.numbers))

    @property
    def solution(self) -> str:
        """A right response in steps of one or two additions, to follow the generation prompt."""
        rng = random.Random(self.style)
        total, remaining, lines = self.numbers[0], list(self.numbers[1:]), []
        while remaining:
            count = 2 if len(remaining) > 1 and rng.random() < self.settings.skip else 1
            terms, remaining = remaining[:count], remaining[count:]
            lines.append(f"{'+'.join(map(str, [total, *terms]))}={total + sum(terms)}")
            total += sum(terms)
            if self.settings.repeat_each and rng.random() < self.settings.repeat_each:
                lines.append(lines[-1])
        if rng.random() < self.settings.repeat_last:
            lines.append(lines[-1])
        return "\n".join([*lines, "</think>", f"\\boxed{{{self.answer}}}"])


def draw_problems(seed: int, settings: TaskSettings) -> Iterator[Problem]:
    """Endless random problems, in which the same numbers may come again."""
    rng = random.Random(seed)
    while True:
        count = rng.randint(settings.fewest_numbers, settings.most_numbers)
        numbers = tuple(rng.randint(SMALLEST, LARGEST) for _ in range(count))
        yield Problem(numbers, "", rng.getrandbits(32), settings)


def skip_repeated(problems: Iterator[Problem]) -> Iterator[Problem]:
    """The problems without those that have the same numbers in the same order as an earlier one."""
    seen: set[tuple[int, ...]] = set()
    for problem in problems:
        if problem.numbers not in seen:
            seen.add(problem.numbers)
            yield problem
