"""Interface of the graders that `reward.verifier` names: they give each response a verdict. Standard library alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Self

from nemo_disco.rewards.verdict import Verdict

GoldAnswers = str | Sequence[str]  # of one response; of several alternatives any is right


class Grader(ABC):
    """Gives each response a verdict. `close` it, or use it as a context manager, to end its processes."""

    def __init__(self, require_think: bool = False) -> None:
        """require_think: a response without `</think>` gets 0. Where there is one, only the text behind it counts."""
        self._require_think = require_think

    def grade(self, responses: Sequence[str], answers: Sequence[GoldAnswers]) -> list[float]:
        """The reward of each response. answers: its gold answer, or several alternatives.

        Raises ValueError if the lengths differ.
        """
        return [verdict.reward for verdict in self.grade_with_reasons(responses, answers)]

    @abstractmethod
    def grade_with_reasons(self, responses: Sequence[str], answers: Sequence[GoldAnswers]) -> list[Verdict]:
        """As `grade`, each reward with its reason."""

    def close(self) -> None:  # noqa: B027 - not abstract: most graders have no processes
        """End the grader's processes. It cannot be used again."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def pair(responses: Sequence[str], answers: Sequence[GoldAnswers]) -> list[tuple[str, tuple[str, ...]]]:
    """Each response with the tuple of its gold answers. Raises ValueError if the lengths differ."""
    if len(responses) != len(answers):
        raise ValueError(f"{len(responses)} responses, but {len(answers)} answers")
    return [(r, (a,) if isinstance(a, str) else tuple(a)) for r, a in zip(responses, answers, strict=True)]
