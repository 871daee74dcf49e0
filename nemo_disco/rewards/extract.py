"""Extracts the final answer from a response: the last \\boxed{} after the thinking. Linear in the response's length.

String processing alone: nothing is parsed as mathematics.
"""

from __future__ import annotations

import re

from nemo_disco.rewards import verdict

END_OF_THINKING = "</think>"
_OPEN = re.compile(r"\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace, \{ or \}, is text


class NoAnswerError(ValueError):
    """The response has no final answer; the message is the verdict's reason."""


def extract_answer(response: str, require_think: bool) -> str:
    """Extract the content of the last \\boxed{}; a response with `</think>` is searched after its last one only.

    The last box counts even if it is empty or cut off, since it replaces earlier ones.
    Raises NoAnswerError if that box is missing, unclosed or empty, or if `require_think` and there is no `</think>`.
    """
    _, tag, rest = response.rpartition(END_OF_THINKING)
    if require_think and not tag:
        raise NoAnswerError(verdict.NO_THINK)
    content = extract_box(rest)
    if not content.strip():
        raise NoAnswerError(verdict.EMPTY_BOX)
    return content


def extract_box(text: str) -> str:
    """Extract the content of the last `\\boxed{...}`. Raises NoAnswerError if there is none or it is unclosed."""
    end = len(text)
    while (start := text.rfind(r"\boxed", 0, end)) >= 0:
        if opening := _OPEN.match(text, start + len(r"\boxed")):
            return _balanced(text, opening.end())
        end = start
    raise NoAnswerError(verdict.NO_BOX)


def extract_box_or(text: str, default: str) -> str:
    """As `extract_box`, or `default` where that raises."""
    try:
        return extract_box(text)
    except NoAnswerError:
        return default


def _balanced(text: str, start: int) -> str:
    """The text from `start`, just behind an opening brace, to its closing brace. Raises NoAnswerError without one."""
    depth = 1
    for token in _BRACE.finditer(text, start):
        if token[0] == "{":
            depth += 1
        elif token[0] == "}":
            depth -= 1
            if depth == 0:
                return text[start : token.start()]
    raise NoAnswerError(verdict.OPEN_BOX)
