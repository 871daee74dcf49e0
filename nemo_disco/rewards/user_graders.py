"""Graders that call a user's function or class, in processes that can be killed (user_pool.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nemo_disco.rewards import verdict
from nemo_disco.rewards.extract import END_OF_THINKING
from nemo_disco.rewards.grader import GoldAnswers, Grader, pair
from nemo_disco.rewards.user_pool import UserPool
from nemo_disco.rewards.verdict import Verdict


class _UserGrader(Grader):
    """Calls the user's code once per response, in parallel; a call that takes too long gives its response 0.

    An error that the code raises, or a reward that is not a finite number, ends the run: the policy must not train on
    rewards that failed without notice.
    """

    def __init__(self, pool: UserPool, require_think: bool = False) -> None:
        super().__init__(require_think)
        self._pool = pool

    def close(self) -> None:
        self._pool.close()

    def _results(self, responses: Sequence[str], answers: Sequence[GoldAnswers], *method: str) -> list[Any]:
        """The result of each call: None if it took too long, NO_THINK for a response without a required `</think>`."""
        calls = [
            None if self._require_think and END_OF_THINKING not in r else self._pool.submit(*method, r, golds)
            for r, golds in pair(responses, answers)
        ]
        return [verdict.NO_THINK if call is None else call.result() for call in calls]


class UserFunction(_UserGrader):
    """Grades with `function(response, answers) -> reward`, a finite number; answers: a tuple of gold answers.

    The function gets the whole response, its thinking included.
    """

    def __init__(self, name: str, require_think: bool = False, timeout: float = 5.0, workers: int = 2) -> None:
        """name: module:function. timeout: seconds a call, after which the reward is 0. workers: processes."""
        super().__init__(UserPool("reward.verifier", name, workers, timeout), require_think)

    def grade_with_reasons(self, responses: Sequence[str], answers: Sequence[GoldAnswers]) -> list[Verdict]:
        return [_function_verdict(result) for result in self._results(responses, answers)]


class UserClass(_UserGrader):
    """Grades with a user's class of MathGrader's interface: one instance per process, one response per call."""

    def __init__(self, name: str, settings: dict[str, Any], timeout: float, workers: int) -> None:
        """name: module:class. settings: the class's arguments. timeout: seconds a call.

        A class with an argument `timeout` applies it itself (MathGrader counts processor time, without its start): its
        calls are given up only after four times that by the clock, and at least 30 s.
        """
        limit = max(4 * timeout, 30.0) if "timeout" in settings else timeout
        super().__init__(UserPool("reward.verifier", name, workers, limit, settings, grace=timeout))

    def grade(self, responses: Sequence[str], answers: Sequence[GoldAnswers]) -> list[float]:
        return [0.0 if reward is None else reward for reward in self._results(responses, answers, "grade")]

    def grade_with_reasons(self, responses: Sequence[str], answers: Sequence[GoldAnswers]) -> list[Verdict]:
        results = self._results(responses, answers, "grade_with_reasons")
        return [Verdict.from_reason(verdict.TIMEOUT) if result is None else Verdict(*result) for result in results]


def _function_verdict(result: float | str | None) -> Verdict:
    """The verdict on a function's result: a reward, None for a timeout, or the reason for which it was not called."""
    if result is None or isinstance(result, str):
        return Verdict.from_reason(result or verdict.TIMEOUT)
    return Verdict(result, verdict.CORRECT if result == 1 else f"reward {result:g}")
