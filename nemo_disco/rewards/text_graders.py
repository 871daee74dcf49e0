"""Graders that compare text: exact match, a number, a choice. They run in the caller's process and evaluate nothing."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Sequence
from fractions import Fraction

from nemo_disco.rewards import verdict
from nemo_disco.rewards.extract import END_OF_THINKING, NoAnswerError, extract_box, extract_box_or
from nemo_disco.rewards.grader import GoldAnswers, Grader, pair
from nemo_disco.rewards.math.fast_path import parse_numeral
from nemo_disco.rewards.math.units import strip_unit
from nemo_disco.rewards.math.words import LETTERS_ALONE, names_second_choice
from nemo_disco.rewards.verdict import Verdict
from nemo_disco.runtime.errors import UserError


class TextGrader(Grader):
    """A grader that judges each response by its text after the thinking. Subclasses define `_judge`."""

    def grade_with_reasons(self, responses: Sequence[str], answers: Sequence[GoldAnswers]) -> list[Verdict]:
        return [self._verdict(response, golds) for response, golds in pair(responses, answers)]

    def _verdict(self, response: str, golds: tuple[str, ...]) -> Verdict:
        _, tag, text = response.rpartition(END_OF_THINKING)
        if self._require_think and not tag:
            return Verdict.from_reason(verdict.NO_THINK)
        return Verdict.from_reason(self._judge(text, golds))

    @abstractmethod
    def _judge(self, text: str, golds: tuple[str, ...]) -> str:
        """The verdict's reason. text: the response after its thinking."""


class ExactMatch(TextGrader):
    """Right if the last box, or the whole text without one, equals a gold answer; runs of spaces count as one."""

    def _judge(self, text: str, golds: tuple[str, ...]) -> str:
        answer = _one_spaced(extract_box_or(text, text))
        return verdict.CORRECT if answer in map(_one_spaced, golds) else verdict.WRONG


class NumericMatch(TextGrader):
    """Right if the number in the last box, or the text's last number without one, is within `tolerance` of a gold one.

    tolerance: relative to the gold answer; 0 compares exactly, as fractions.
    """

    _NUMBER = re.compile(  # a hyphen behind a word or number is not a sign: 3-5, GPT-4
        r"(?:(?<![\w.)\]}%])[+-])?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d))(?:[eE][+-]?\d+)?(?:\s*/\s*\d+)?\s*%?"
    )

    def __init__(self, require_think: bool = False, tolerance: float = 1e-6) -> None:
        super().__init__(require_think)
        if not 0 <= tolerance < 1:
            raise UserError(f"reward.parameters.tolerance={tolerance} must be a share of the answer, >= 0 and < 1")
        self._tolerance = tolerance

    def _judge(self, text: str, golds: tuple[str, ...]) -> str:
        numbers = [n for n in self._NUMBER.findall(text.replace("\N{MINUS SIGN}", "-")) if n.strip()]
        answer = extract_box_or(text, numbers[-1] if numbers else "")
        if not answer.strip():
            return verdict.NO_BOX
        value = _number(answer)
        if value is None:
            return verdict.UNPARSABLE
        gold_values = [number for gold in golds if (number := _number(gold)) is not None]
        if not gold_values:
            return verdict.UNPARSABLE_GOLD
        right = any(abs(value - gold) <= abs(gold) * self._tolerance for gold in gold_values)
        return verdict.CORRECT if right else verdict.WRONG


class MultipleChoice(TextGrader):
    """Right if the letter in the last box, else in the last "answer is (C)", else the whole text, is the gold one.

    Two letters, as in "A or C", are no choice; neither is a word that begins with one, or the article in "A cat".
    """

    _MARK = r"[(\[*]*([A-Z])\b[)\]*]*"
    _VERB = (
        r"(?i:answer|option|choice|choose|chose|pick|select|go\s+with)(?i:\s+is|\s+option|\s+answer|\s+choice)*\s*:?\s*"
    )
    _STATEMENT = re.compile(
        rf"\b{_VERB}(?:[(\[*]+([A-Za-z])[)\]*]+|{_MARK}(?!['\w])(?!\s+(?!because|since|as|is|for|with)[a-z]))"
        rf"|(?<![\w'])(?!I\b){_MARK}\s+is\s+(?:the\s+)?(?:correct|right|best|answer)"
    )
    _ANOTHER = re.compile(  # a second letter: joined to the first by "or", or in a list of letters alone, A. B. C. D
        r"\s*(?:,|/|&|\bor\b|\band\b|\\text\s*\{\s*(?:or|and)\s*\})+\s*\(?[A-Z]\b"
        rf"|{LETTERS_ALONE}"
    )
    _OPTION_LINE = re.compile(r"\n\s*\(?[A-Z][).:]")  # in a list of the options
    _LETTER = re.compile(
        r"[\s({\[$*]*(?:\\(?:text|mathrm|textbf|mathbf)\s*\{)?[\s(*]*([A-Za-z])(?:[\s}$*]*|(?=[\s}*]*[)\].:])[)\]}.:*$]*(.*))",
        re.DOTALL,
    )

    def _judge(self, text: str, golds: tuple[str, ...]) -> str:
        try:
            choice = self._letter(extract_box(text))
        except NoAnswerError:  # without a box the text may discuss other options: "C. Since (A) and (B) are too small"
            choice = self._letter(self._last_statement(text), alone=False)
        if choice is None:
            return verdict.NO_CHOICE
        letters = {letter for gold in golds if (letter := self._letter(gold))}
        if not letters:
            return verdict.UNPARSABLE_GOLD
        return verdict.CORRECT if choice in letters else verdict.WRONG

    def _last_statement(self, text: str) -> str:
        """The letter in the last "answer is C", with a letter joined to it, if any; else the whole text."""
        statements = list(self._STATEMENT.finditer(text))
        if not statements:
            return text.strip()
        letter = next(group for group in statements[-1].groups() if group)
        another = self._ANOTHER.match(text, statements[-1].end())
        return letter + (another[0] if another else "")

    def _letter(self, text: str, alone: bool = True) -> str | None:
        """The one letter that a text chooses, as in C, (c) or C. Paris; None if there is none, or more than one.

        alone: the text is nothing but the choice, so that a letter anywhere in it would be a second one.
        """
        match = self._LETTER.fullmatch(text)
        rest = match[2] or "" if match else ""
        several = self._ANOTHER.match(rest) or self._OPTION_LINE.search(rest) or (alone and names_second_choice(rest))
        return None if match is None or several else match[1].upper()


def _number(answer: str) -> Fraction | None:
    """The value of a number with or without a unit, percent as hundredths; None for other texts."""
    number = parse_numeral(strip_unit(answer))
    return None if number is None else number.value / (100 if number.percent else 1)


def _one_spaced(text: str) -> str:
    return " ".join(text.split())
