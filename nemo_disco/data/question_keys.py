"""Keys of questions, by which the same question is found in two files.

Pure string work: two texts have the same key if they have the same words and numbers, whatever the typesetting.
"""

from __future__ import annotations

import re
import unicodedata

from nemo_disco.data.questions import Question

# The instruction that some question files append to the text (verl's Parquet files do, the JSON files do not).
_INSTRUCTION = re.compile(r"\s*(?:let'?s think step by step|please reason step by step)\b[^\n]*\Z", re.IGNORECASE)
_COMMANDS = re.compile(r"\\(?:left|right|displaystyle|[dt]?frac|text|mathrm|[,;!]|\s)(?![a-zA-Z])")
_PUNCTUATION = re.compile(r"(?<!\d)\.|\.(?!\d)|[^\w<>=+*/^!.-]|_")


def question_key(question: Question) -> str:
    """Key of the question's user turns (see text_key)."""
    return text_key(question.user_text)


def text_key(text: str) -> str:
    """The text without case, spaces, punctuation, LaTeX sizing commands and a trailing instruction to think."""
    plain = unicodedata.normalize("NFKC", text).replace("\N{MINUS SIGN}", "-")
    return _PUNCTUATION.sub("", _COMMANDS.sub("", _INSTRUCTION.sub("", plain))).casefold()
