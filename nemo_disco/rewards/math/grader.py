"""The math grader: reward 1 where the last \\boxed{} after the thinking equals a gold answer, else 0.

Plain answers are decided here (fast_path.py), the rest by algebra in killable processes (algebra_pool.py). Usable from
any thread.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Self

from nemo_disco.rewards import verdict
from nemo_disco.rewards.extract import NoAnswerError, boxed, final_answer
from nemo_disco.rewards.math.algebra_pool import WorkerPool
from nemo_disco.rewards.math.canonical import canonical
from nemo_disco.rewards.math.fast_path import decide, numeral
from nemo_disco.rewards.math.units import for_algebra, quantity
from nemo_disco.rewards.verdict import Verdict

MAX_ANSWER = 10_000  # characters of a box that are worth parsing
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


class MathGrader:
    """Grades mathematical answers. `close` it, or use it as a context manager, to end its processes.

    timeout: seconds of processor time that one answer may take in algebra; then its reward is 0. Neither starting up
    nor waiting for a processor counts.
    workers: answers that are judged at once. The result depends on neither it nor the order of the answers.
    require_think: whether a response without `</think>` gets 0. Where there is one, only what follows it counts.
    """

    def __init__(self, timeout: float = 5.0, workers: int = 2, require_think: bool = False) -> None:
        if not timeout > 0 or workers < 1:
            raise ValueError(f"timeout must be positive and workers at least 1, not {timeout} and {workers}")
        self._require_think = require_think
        self._pool = WorkerPool(workers, timeout)

    def grade(self, responses: Sequence[str], answers: Sequence[str | Sequence[str]]) -> list[float]:
        """The reward of each response, 0.0 or 1.0; `answers[i]` is its gold answer, or several of which any counts.

        Raises ValueError if the lengths differ, RuntimeError if the process for algebra cannot be started.
        """
        return [verdict.reward for verdict in self.grade_with_reasons(responses, answers)]

    def grade_with_reasons(self, responses: Sequence[str], answers: Sequence[str | Sequence[str]]) -> list[Verdict]:
        """As `grade`, each reward with its reason."""
        if len(responses) != len(answers):
            raise ValueError(f"{len(responses)} responses, but {len(answers)} answers")
        asked: dict[tuple[str, tuple[str, ...]], Future[str]] = {}  # a group's equal answers are judged once
        outcomes: list[str | Future[str]] = []
        for response, gold in zip(responses, answers, strict=True):
            question = self._prepare(response, (gold,) if isinstance(gold, str) else tuple(gold))
            if isinstance(question, str):
                outcomes.append(question)
                continue
            if question not in asked:
                asked[question] = self._pool.submit(*question)
            outcomes.append(asked[question])
        return [Verdict.of(o if isinstance(o, str) else o.result()) for o in outcomes]

    def unread(self, answers: Sequence[str]) -> list[str]:
        """For each gold answer what hinders algebra with it, "" where nothing does: such an answer is only right as it
        is spelled. Raises as `grade`."""
        asked: dict[str, str | Future[str]] = {}
        for answer in dict.fromkeys(answers):
            gold = _unboxed(answer)
            if numeral(quantity(canonical(gold)).body) is not None:
                asked[answer] = verdict.CORRECT
            elif len(gold) > MAX_ANSWER or not gold.strip():
                asked[answer] = verdict.TOO_LONG if gold.strip() else verdict.EMPTY_BOX
            else:
                algebra = for_algebra(gold)
                asked[answer] = self._pool.submit(algebra, (algebra,))
        reasons = {a: o if isinstance(o, str) else o.result() for a, o in asked.items()}
        return ["" if reasons[answer] == verdict.CORRECT else reasons[answer] for answer in answers]

    def close(self) -> None:
        """End the processes. The grader cannot be used again."""
        self._pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _prepare(self, response: str, golds: tuple[str, ...]) -> str | tuple[str, tuple[str, ...]]:
        """The reason, where plain comparison settles it; else (answer, golds) for algebra."""
        try:
            answer = final_answer(response, self._require_think)
        except NoAnswerError as error:
            return str(error)
        golds = tuple(map(_unboxed, golds))
        if answer in golds:
            return verdict.CORRECT
        if len(answer) > MAX_ANSWER:
            return verdict.TOO_LONG
        if _CONTROL.search(answer):
            return verdict.UNPARSABLE
        golds = tuple(gold for gold in golds if gold.strip() and len(gold) <= MAX_ANSWER)
        if not golds:
            return verdict.UNPARSABLE_GOLD
        decisions = {gold: decide(answer, gold) for gold in golds}
        if any(decisions.values()):
            return verdict.CORRECT
        undecided = tuple(for_algebra(gold) for gold, decision in decisions.items() if decision is None)
        return (for_algebra(answer), undecided) if undecided else verdict.WRONG


def _unboxed(gold: str) -> str:
    try:
        return boxed(gold)
    except NoAnswerError:
        return gold
