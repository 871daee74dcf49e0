"""The reward of a response: a weighted sum of terms, among them the grader's verdict and a user's function.

A term maps one graded response to a number. Plain Python: no tensors, groups or objectives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from nemo_disco.rewards.extract import NoAnswerError, extract_answer
from nemo_disco.rewards.user_pool import UserPool, describe_code, rank_workers
from nemo_disco.runtime.errors import UserError

if TYPE_CHECKING:
    from nemo_disco.config.schema import RewardConfig


@dataclass(frozen=True)
class GradedResponse:
    """A response with its question and verdict: the argument of a reward term.

    question: text of the last message. response: text without its end token. answers: gold answers. metadata: other
    fields of the question's record. verdict: the grader's reward; correct: verdict above `algorithm.threshold`.
    length: tokens, at most max_response_length in this step; truncated: cut off there.
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
    """The grader's reward: 0 or 1, or any number of a user's grader."""
    return r.verdict


def well_formed(r: GradedResponse, require_think: bool) -> float:
    """1 if the response has a complete \\boxed{} (after `</think>`, if that is required), right or wrong; else 0."""
    try:
        extract_answer(r.response, require_think)
    except NoAnswerError:
        return 0.0
    return 1.0


def length(r: GradedResponse) -> float:
    """1 - |o|/C for a response of |o| tokens and the limit C (arXiv 2510.04474)."""
    return 1 - r.length / r.max_response_length


def overlong(r: GradedResponse, buffer: int | None) -> float:
    """((C - Lc) - |o|) / Lc, within -1 and 0; Lc is the buffer, C/5 for None (arXiv 2503.14476, eq. 13)."""
    buffer = buffer or max(1, r.max_response_length // 5)
    return max(-1.0, min(0.0, (r.max_response_length - buffer - r.length) / buffer))


class Rewards:
    """Computes each response's reward, the weighted sum of a run's terms, and the terms that an objective asks for.

    A user's functions run in their own processes, which end with `close`.
    """

    def __init__(self, config: RewardConfig, columns: Mapping[str, str] = MappingProxyType({})) -> None:
        """columns: terms to compute beside the reward: key of algorithm.* that names the term -> a name of reward.terms
        or module:function. Raises UserError for an unknown term or function."""
        self._config = config
        self._terms = [(w, self._build_term(name)) for name, w in config.terms.model_dump().items() if w]
        self._function = None if config.function is None else self._load_function("reward.function", config.function)
        self.columns = {column: self._load_column(column, name) for column, name in columns.items()}

    def compute(self, responses: Sequence[GradedResponse]) -> list[tuple[float, ...]]:
        """The reward of each response, then its value of each column.

        A user's function that takes longer than reward.timeout gives 0, with a warning. Raises UserError, with file and
        line, for a function that raises or returns no finite number.
        """
        calls = [_submit(term, responses) for term in (self._function, *self.columns.values())]
        sums = [math.fsum(weight * term(response) for weight, term in self._terms) for response in responses]
        return [
            (weighted_sum + function_value(), *(value() for value in column_values))
            for weighted_sum, function_value, *column_values in zip(sums, *calls, strict=True)
        ]

    def close(self) -> None:
        """End the processes of a user's functions; calls that have not begun are cancelled."""
        for term in (self._function, *self.columns.values()):
            if isinstance(term, UserPool):
                term.close()

    def _build_term(self, name: str) -> Term:
        terms: dict[str, Term] = {
            "correctness": correctness,
            "format": partial(well_formed, require_think=self._config.require_think),
            "length": length,
            "overlong": partial(overlong, buffer=self._config.overlong_buffer),
        }
        return terms[name]

    def _load_column(self, column: str, name: str) -> Term | UserPool:
        if ":" in name:
            return self._load_function(f"algorithm.{column}", name)
        names = list(type(self._config.terms).model_fields)
        if name not in names:
            raise UserError(
                f"algorithm.{column}: there is no reward term {name!r}; known: {', '.join(names)}, or "
                "module:function of your own"
            )
        return self._build_term(name)

    def _load_function(self, key: str, name: str) -> UserPool:
        """The user's function, which the setting `key` names. Raises UserError if there is no such function."""
        if ":" not in name or describe_code(key, name).kind != "function":
            raise UserError(f"{key}={name} must be module:function, and the function must take a GradedResponse")
        return UserPool(key, name, rank_workers(self._config.workers), self._config.timeout)


def _submit(term: Term | UserPool | None, responses: Sequence[GradedResponse]) -> list[Callable[[], float]]:
    """Start a user's function on all responses; returns a call per response that gives its number, 0 without a term."""
    if isinstance(term, UserPool):
        return [partial(_result_or_zero, term.submit(response)) for response in responses]
    return [partial(term, response) if term else float for response in responses]


def _result_or_zero(call: Future[Any]) -> float:
    value = call.result()  # None if it took too long
    return 0.0 if value is None else float(value)
