"""One spelling for a question's text, so that the same question is found in two files.

Pure string work: an equal key means the same words and numbers, whatever the typesetting.
"""

from __future__ import annotations

import re
import unicodedata

from nemo_disco.data.questions import Question

# What prompts append to a question: verl's Parquet files have it in the text, JSON files do not.
_INSTRUCTION = re.compile(r"\s*(?:let'?s think step by step|please reason step by step)\b[^\n]*\Z", re.IGNORECASE)
_COMMANDS = re.compile(r"\\(?:left|right|displaystyle|[dt]?frac|text|mathrm|[,;!]|\s)(?![a-zA-Z])")
_PUNCTUATION = re.compile(r"(?<!\d)\.|\.(?!\d)|[^\w<>=+*/^!.-]|_")


def question_key(question: Question) -> str:
    """What the user is asked, without case, spaces, punctuation, LaTeX's sizes and a trailing instruction."""
    return text_key(question.user_text)


def text_key(text: str) -> str:
    """As `question_key`, of a text."""
    plain = unicodedata.normalize("NFKC", text).replace("\N{MINUS SIGN}", "-")
    return _PUNCTUATION.sub("", _COMMANDS.sub("", _INSTRUCTION.sub("", plain))).casefold()
