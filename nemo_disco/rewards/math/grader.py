"""The math grader: reward 1 if the last \\boxed{} after the thinking equals a gold answer, else 0.

Compares plain answers in the caller's process (fast_path.py), others in killable processes (algebra_pool.py).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import Future

from nemo_disco.rewards import verdict
from nemo_disco.rewards.extract import NoAnswerError, extract_answer, extract_box_or
from nemo_disco.rewards.grader import GoldAnswers, Grader, pair
from nemo_disco.rewards.math.algebra_pool import AlgebraPool
from nemo_disco.rewards.math.fast_path import decide, parse_numeral
from nemo_disco.rewards.math.units import strip_unit
from nemo_disco.rewards.verdict import Verdict

MAX_ANSWER = 10_000  # characters; a longer answer is wrong unless it equals the gold answer's text
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


class MathGrader(Grader):
    """Grades mathematical answers, from any thread. `close` it, or use it as a context manager, to end its processes.

    timeout: seconds of processor time for one answer's algebra, after which its reward is 0; neither starting up nor
    waiting for a processor counts.
    workers: answers compared at once. Verdicts depend neither on this number nor on the order of the answers.
    require_think: a response without `</think>` gets 0. Where there is one, only the text behind it counts.
    """

    def __init__(self, timeout: float = 5.0, workers: int = 2, require_think: bool = False) -> None:
        if not timeout > 0 or workers < 1:
            raise ValueError(f"timeout must be positive and workers at least 1, not {timeout} and {workers}")
        super().__init__(require_think)
        self._pool = AlgebraPool(workers, timeout)

    def grade_with_reasons(self, responses: Sequence[str], answers: Sequence[GoldAnswers]) -> list[Verdict]:
        """As `grade`, each reward with its reason. Both raise RuntimeError if the process for algebra cannot start."""
        comparisons: dict[tuple[str, tuple[str, ...]], Future[str]] = {}  # equal answers of a group are compared once
        reasons: list[str | Future[str]] = []
        for response, golds in pair(responses, answers):
            comparison = self._compare(response, golds)
            if isinstance(comparison, str):
                reasons.append(comparison)
                continue
            if comparison not in comparisons:
                comparisons[comparison] = self._pool.submit(*comparison)
            reasons.append(comparisons[comparison])
        return [Verdict.from_reason(r if isinstance(r, str) else r.result()) for r in reasons]

    def find_unparsable(self, answers: Sequence[str]) -> list[str]:
        """For each gold answer, the reason why algebra cannot parse it, "" if it can: a response to an unparsable one
        is right only if it repeats its text. Raises as `grade_with_reasons`."""
        outcomes: dict[str, str | Future[str]] = {}
        for answer in dict.fromkeys(answers):
            gold = extract_box_or(answer, answer)
            body = strip_unit(gold)
            if parse_numeral(body) is not None:
                outcomes[answer] = verdict.CORRECT
            elif len(gold) > MAX_ANSWER or not gold.strip():
                outcomes[answer] = verdict.TOO_LONG if gold.strip() else verdict.EMPTY_BOX
            else:
                outcomes[answer] = self._pool.submit(body, (body,))
        reasons = {a: o if isinstance(o, str) else o.result() for a, o in outcomes.items()}
        return ["" if reasons[answer] == verdict.CORRECT else reasons[answer] for answer in answers]

    def close(self) -> None:
        self._pool.close()

    def _compare(self, response: str, golds: tuple[str, ...]) -> str | tuple[str, tuple[str, ...]]:
        """The verdict's reason if text and numbers decide it; else the arguments (answer, golds) for algebra."""
        try:
            answer = extract_answer(response, self._require_think)
        except NoAnswerError as error:
            return str(error)
        golds = tuple(extract_box_or(gold, gold) for gold in golds)
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
        undecided = tuple(strip_unit(gold) for gold, decision in decisions.items() if decision is None)
        return (strip_unit(answer), undecided) if undecided else verdict.WRONG
