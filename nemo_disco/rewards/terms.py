"""What a response earns: a weighted sum of terms, of which the grader's verdict is one and a user's function another.

A term sees one graded response and returns a number. Plain Python: knows no tensor, no group and no objective.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from nemo_disco.rewards.extract import NoAnswerError, final_answer
from nemo_disco.rewards.user_pool import UserPool, describe, rank_workers
from nemo_disco.runtime.errors import UserError

if TYPE_CHECKING:
    from nemo_disco.config.schema import RewardConfig


@dataclass(frozen=True)
class GradedResponse:
    """What a term sees.

    question: the text of what was asked last. response: without the token that ended it. answers: the right ones.
    metadata: the other fields of the question's record. verdict: the grader's reward; correct: is it above the
    threshold. length: tokens, of at most max_response_length in this step; truncated: cut there.
    """

    question: str
    response: str
    answers: tuple[str, ...]
    verdict: float
    correct: bool
    length: int
    max_response_length: int
    truncated: bool = False
    metadata: Mapping[str, Any] = field(default_factory=dict)


Term = Callable[[GradedResponse], float]


def correctness(r: GradedResponse) -> float:
    """The grader's verdict, 0 or 1."""
    return r.verdict


def well_formed(r: GradedResponse, require_think: bool) -> float:
    """1 where the response has a closed, filled box (after `</think>`, where that is required), right or wrong."""
    try:
        final_answer(r.response, require_think)
    except NoAnswerError:
        return 0.0
    return 1.0


def length(r: GradedResponse) -> float:
    """1 - |o|/C, C the response limit (arXiv 2510.04474)."""
    return 1 - r.length / r.max_response_length


def overlong(r: GradedResponse, buffer: int | None) -> float:
    """0 up to C - Lc tokens, then down to -1 at C: ((C - Lc) - |o|) / Lc, Lc the buffer (arXiv 2503.14476, eq. 13)."""
    cache = buffer or max(1, r.max_response_length // 5)
    return max(-1.0, min(0.0, (r.max_response_length - cache - r.length) / cache))


class Rewards:
    """The terms of a run: a response's reward is their weighted sum, its preference one of them, for DRPO.

    A user's functions run in processes of their own, which end with `close`.
    """

    def __init__(self, config: RewardConfig, preference: str | None = None) -> None:
        """Raises UserError for a preference or a function that there is not."""
        self._config = config
        self._terms = [(w, self._own(name)) for name, w in config.terms.model_dump().items() if w]
        self._function = None if config.function is None else self._users("reward.function", config.function)
        self._preference: Term | UserPool | None = None if preference is None else self._named(preference)

    def judge(self, responses: Sequence[GradedResponse]) -> list[tuple[float, float]]:
        """The reward and the preference of each; the preference is 0 where none was asked for.

        A user's function that takes longer than reward.timeout gives 0, which is said. Raises UserError, with file and
        line, for one that raises or returns no finite number.
        """
        added = _numbers(self._function, responses)
        preferences = _numbers(self._preference, responses)
        rewards = [math.fsum(weight * term(response) for weight, term in self._terms) for response in responses]
        return [
            (reward + more(), preference())
            for reward, more, preference in zip(rewards, added, preferences, strict=True)
        ]

    def close(self) -> None:
        """End the processes of a user's functions; calls that have not begun are not made."""
        for term in (self._function, self._preference):
            if isinstance(term, UserPool):
                term.close()

    def reward(self, response: GradedResponse) -> float:
        return self.judge([response])[0][0]

    def preference(self, response: GradedResponse) -> float:
        """0 where none was asked for."""
        return self.judge([response])[0][1]

    def _own(self, name: str) -> Term:
        terms: dict[str, Term] = {
            "correctness": correctness,
            "format": partial(well_formed, require_think=self._config.require_think),
            "length": length,
            "overlong": partial(overlong, buffer=self._config.overlong_buffer),
        }
        return terms[name]

    def _named(self, name: str) -> Term | UserPool:
        if ":" in name:
            return self._users("algorithm.preference", name)
        known = list(type(self._config.terms).model_fields)
        if name not in known:
            raise UserError(
                f"algorithm.preference: there is no reward term {name!r}; known: {', '.join(known)}, or "
                "module:function of your own"
            )
        return self._own(name)

    def _users(self, key: str, name: str) -> UserPool:
        """A user's function, whose failures are named with file and line. Raises UserError if there is none."""
        if ":" not in name or describe(key, name).kind != "function":
            raise UserError(f"{key}={name} must be module:function, of a function that takes a GradedResponse")
        return UserPool(key, name, rank_workers(self._config.workers), self._config.timeout)


def _numbers(term: Term | UserPool | None, responses: Sequence[GradedResponse]) -> list[Callable[[], float]]:
    """What the term says of each response, once it is asked for; 0 where there is no term, or it took too long."""
    if isinstance(term, UserPool):
        return [partial(_in_time, term.submit(response)) for response in responses]
    return [partial(term, response) if term else float for response in responses]


def _in_time(call: Future[Any]) -> float:
    value = call.result()
    return 0.0 if value is None else float(value)
