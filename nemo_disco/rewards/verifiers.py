"""Verifiers without mathematics, behind MathGrader's interface: exact match, a number, a choice, the user's function.

Plain comparison in the caller's process; none of them runs what a response says.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from nemo_disco.rewards import verdict
from nemo_disco.rewards.extract import END_OF_THINKING, NoAnswerError, boxed
from nemo_disco.rewards.math.canonical import canonical
from nemo_disco.rewards.math.fast_path import numeral
from nemo_disco.rewards.math.units import quantity
from nemo_disco.rewards.math.words import LETTERS_ALONE, names_another
from nemo_disco.rewards.user_pool import UserPool
from nemo_disco.rewards.verdict import Verdict
from nemo_disco.runtime.errors import UserError

Alternatives = str | Sequence[str]


class Verifier(ABC):
    """What gives a response its reward. `close` it, or use it as a context manager."""

    def __init__(self, require_think: bool = False) -> None:
        """require_think: whether a response without `</think>` gets 0. Where there is one, what follows it counts."""
        self._require_think = require_think

    def grade(self, responses: Sequence[str], answers: Sequence[Alternatives]) -> list[float]:
        """The reward of each response; `answers[i]` is its gold answer, or several of which any counts.

        Raises ValueError if the lengths differ.
        """
        return [verdict.reward for verdict in self.grade_with_reasons(responses, answers)]

    def grade_with_reasons(self, responses: Sequence[str], answers: Sequence[Alternatives]) -> list[Verdict]:
        """As `grade`, each reward with its reason."""
        if len(responses) != len(answers):
            raise ValueError(f"{len(responses)} responses, but {len(answers)} answers")
        pairs = zip(responses, answers, strict=True)
        return [self._verdict(r, (a,) if isinstance(a, str) else tuple(a)) for r, a in pairs]

    def close(self) -> None:  # noqa: B027 - not abstract: most hold nothing
        """Let go of what is held."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _verdict(self, response: str, golds: tuple[str, ...]) -> Verdict:
        _, tag, said = response.rpartition(END_OF_THINKING)
        if self._require_think and not tag:
            return Verdict.of(verdict.NO_THINK)
        return self._judge(said, golds)

    @abstractmethod
    def _judge(self, said: str, golds: tuple[str, ...]) -> Verdict:
        """said: the response after its thinking."""


class ExactMatch(Verifier):
    """The last box, or all that is said where there is none, is a gold answer, spaces at the ends and runs apart."""

    def _judge(self, said: str, golds: tuple[str, ...]) -> Verdict:
        given = _words(_box_or(said, said))
        return Verdict.of(verdict.CORRECT if given in map(_words, golds) else verdict.WRONG)


class NumericMatch(Verifier):
    """The number in the last box, or the last number of what is said, is within `tolerance` of a gold answer's.

    tolerance: relative to the gold answer; at 0 the two are compared exactly, as fractions.
    """

    _NUMBER = re.compile(  # a hyphen behind a word or number is no sign: 3-5, GPT-4
        r"(?:(?<![\w.)\]}%])[+-])?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d))(?:[eE][+-]?\d+)?(?:\s*/\s*\d+)?\s*%?"
    )

    def __init__(self, require_think: bool = False, tolerance: float = 1e-6) -> None:
        super().__init__(require_think)
        if not 0 <= tolerance < 1:
            raise UserError(f"reward.parameters.tolerance={tolerance} is a share of the answer: at least 0, below 1")
        self._tolerance = tolerance

    def _judge(self, said: str, golds: tuple[str, ...]) -> Verdict:
        numbers = [n for n in self._NUMBER.findall(said.replace("\N{MINUS SIGN}", "-")) if n.strip()]
        text = _box_or(said, numbers[-1] if numbers else "")
        if not text.strip():
            return Verdict.of(verdict.NO_BOX)
        given = numeral(quantity(canonical(text)).body)
        if given is None:
            return Verdict.of(verdict.UNPARSABLE)
        wanted = [n for gold in golds if (n := numeral(quantity(canonical(gold)).body)) is not None]
        if not wanted:
            return Verdict.of(verdict.UNPARSABLE_GOLD)
        ours = given.value / (100 if given.percent else 1)
        theirs = [n.value / (100 if n.percent else 1) for n in wanted]
        right = any(abs(ours - value) <= abs(value) * self._tolerance for value in theirs)
        return Verdict.of(verdict.CORRECT if right else verdict.WRONG)


class MultipleChoice(Verifier):
    """The letter in the last box, or the last "answer is (C)", or all that is said, is the gold answer's letter.

    Two letters, as in "A or C", are no choice; neither is a word that begins with one, or the article in "A cat".
    """

    _MARK = r"[(\[*]*([A-Z])\b[)\]*]*"
    _VERB = (
        r"(?i:answer|option|choice|choose|chose|pick|select|go\s+with)(?i:\s+is|\s+option|\s+answer|\s+choice)*\s*:?\s*"
    )
    _SAID = re.compile(
        rf"\b{_VERB}(?:[(\[*]+([A-Za-z])[)\]*]+|{_MARK}(?!['\w])(?!\s+(?!because|since|as|is|for|with)[a-z]))"
        rf"|(?<![\w'])(?!I\b){_MARK}\s+is\s+(?:the\s+)?(?:correct|right|best|answer)"
    )
    _ANOTHER = re.compile(  # joined to the first, or one of nothing but letters: A. B. C. D
        r"\s*(?:,|/|&|\bor\b|\band\b|\\text\s*\{\s*(?:or|and)\s*\})+\s*\(?[A-Z]\b"
        rf"|{LETTERS_ALONE}"
    )
    _LISTED = re.compile(r"\n\s*\(?[A-Z][).:]")  # the options, a line each
    _LETTER = re.compile(
        r"[\s({\[$*]*(?:\\(?:text|mathrm|textbf|mathbf)\s*\{)?[\s(*]*([A-Za-z])(?:[\s}$*]*|(?=[\s}*]*[)\].:])[)\]}.:*$]*(.*))",
        re.DOTALL,
    )

    def _judge(self, said: str, golds: tuple[str, ...]) -> Verdict:
        try:
            given = self._letter(boxed(said))
        except NoAnswerError:  # without a box the others may be discussed: "C. Since (A) and (B) are too small"
            given = self._letter(self._last_said(said), alone=False)
        if given is None:
            return Verdict.of(verdict.NO_CHOICE)
        letters = {letter for gold in golds if (letter := self._letter(gold))}
        if not letters:
            return Verdict.of(verdict.UNPARSABLE_GOLD)
        return Verdict.of(verdict.CORRECT if given in letters else verdict.WRONG)

    def _last_said(self, said: str) -> str:
        """The letter that a sentence names, with another one that it names beside it; all that is said without one."""
        found = list(self._SAID.finditer(said))
        if not found:
            return said.strip()
        letter = next(group for group in found[-1].groups() if group)
        another = self._ANOTHER.match(said, found[-1].end())
        return letter + (another[0] if another else "")

    def _letter(self, text: str, alone: bool = True) -> str | None:
        """The one letter that a text chooses, as in C, (c) or C. Paris; None if there is none, or more than one.

        alone: whether the text is no more than the choice, so that a letter anywhere in it would be a second one.
        """
        match = self._LETTER.fullmatch(text)
        rest = match[2] or "" if match else ""
        if match is None or self._ANOTHER.match(rest) or self._LISTED.search(rest) or (alone and names_another(rest)):
            return None
        return match[1].upper()


class _InProcesses(Verifier):
    """A user's code that judges in processes of its own, side by side; one that takes too long costs its response.

    What it raises, and a reward that is no number, ends the run: a reward that fails silently would train on noise.
    """

    def __init__(self, pool: UserPool, require_think: bool = False) -> None:
        super().__init__(require_think)
        self._pool = pool

    def close(self) -> None:
        self._pool.close()

    def _judge(self, said: str, golds: tuple[str, ...]) -> Verdict:
        return self.grade_with_reasons([said], [golds])[0]

    def _results(self, responses: Sequence[str], answers: Sequence[Alternatives], *method: str) -> list[Any]:
        """What was returned for each response; None where it took too long, NO_THINK where that was asked for."""
        if len(responses) != len(answers):
            raise ValueError(f"{len(responses)} responses, but {len(answers)} answers")
        pairs = zip(responses, ((a,) if isinstance(a, str) else tuple(a) for a in answers), strict=True)
        calls = [None if self._lacks_think(r) else self._pool.submit(*method, r, golds) for r, golds in pairs]
        return [verdict.NO_THINK if call is None else call.result() for call in calls]

    def _lacks_think(self, response: str) -> bool:
        return self._require_think and END_OF_THINKING not in response


class UserFunction(_InProcesses):
    """`function(response, answers) -> reward`: the whole response and the gold answers, a tuple of texts; the reward is
    a finite number."""

    def __init__(self, name: str, require_think: bool = False, timeout: float = 5.0, workers: int = 2) -> None:
        """name: module:function. timeout: seconds a call, beyond which the reward is 0; workers: processes."""
        super().__init__(UserPool("reward.verifier", name, workers, timeout), require_think)

    def grade_with_reasons(self, responses: Sequence[str], answers: Sequence[Alternatives]) -> list[Verdict]:
        return [_of_reward(result) for result in self._results(responses, answers)]


class UserClass(_InProcesses):
    """A user's class of MathGrader's interface, built in each process, which is given one response at a time."""

    def __init__(self, name: str, settings: dict[str, Any], timeout: float, workers: int) -> None:
        """settings: what it is built with. One that takes `timeout` keeps to it itself, as MathGrader does by processor
        time and without its start: it is given up by the clock after four times that, and at least 30 s."""
        limit = max(4 * timeout, 30.0) if "timeout" in settings else timeout
        super().__init__(UserPool("reward.verifier", name, workers, limit, settings, grace=timeout))

    def grade(self, responses: Sequence[str], answers: Sequence[Alternatives]) -> list[float]:
        return [0.0 if reward is None else reward for reward in self._results(responses, answers, "grade")]

    def grade_with_reasons(self, responses: Sequence[str], answers: Sequence[Alternatives]) -> list[Verdict]:
        results = self._results(responses, answers, "grade_with_reasons")
        return [Verdict.of(verdict.TIMEOUT) if result is None else Verdict(*result) for result in results]


def _of_reward(result: float | str | None) -> Verdict:
    """result: the reward, None where it took too long, or the reason for which it was not asked."""
    if result is None or isinstance(result, str):
        return Verdict.of(result or verdict.TIMEOUT)
    return Verdict(result, verdict.CORRECT if result == 1 else f"reward {result:g}")


def _box_or(said: str, otherwise: str) -> str:
    try:
        return boxed(said)
    except NoAnswerError:
        return otherwise


def _words(text: str) -> str:
    return " ".join(text.split())
