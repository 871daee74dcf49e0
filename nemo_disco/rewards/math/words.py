"""Compares answers that are words or letters, not formulas: `ABC` is a sequence of points, not a product.

String processing of canonical answers.
"""

from __future__ import annotations

import re

# Short words whose case does not matter; that of longer words, and of words in \\text{}, never does.
_ANY_CASE = {"no", "yes", "odd", "all", "tie", "even", "true", "both", "none"}
_TEXT = re.compile(r"\\text\s*\{\s*((?:[^{}]|\{[^{}]*\})*?)\s*\}")
_WHOLE_TEXT = re.compile(r"\\text\s*\{[^{}]*\}")
_MARKED = re.compile(r"(?:\(\s*([A-Z])\s*\)|([A-Z])\s*[.):])\s*(\S.*)", re.DOTALL)

# A second choice behind the first, "Paris or (B) London"; but "Both (A) and (B)" is the text of one choice.
_SECOND = re.compile(
    r"(?!\s*(?i:both|either|neither|all|none|only)\b).*?(?:\b(?:or|and)\b|\\lor|[,;])\s*(?:\([A-Z]\)|[A-Z][.):])",
    re.DOTALL,
)
_OR_LETTER = re.compile(r"\s*(?:or|and|\\lor|,)\s*[A-Z]\s*$")
LETTERS_ALONE = r"(?:[\s().:]*[A-J](?!\w))+[\s().:]*\Z"  # A. B. C. D
_LETTERS_ALONE, _REFUSED = re.compile(LETTERS_ALONE), re.compile(r"is\s+(?:not|wrong|false|incorrect)\b")


def squeeze(text: str) -> str:
    """Remove the spaces and braces of a canonical text that only typesetting needs: to compare, not to parse."""
    bare = _TEXT.sub(r" \1 ", text)
    bare = re.sub(r"^\s*\(?\s*([A-Za-z])\s*\)\s*$", r"\1", bare)  # the choice (C), or C)
    bare = re.sub(r"([_^])\s*\{\s*([0-9A-Za-z])\s*\}", r"\1\2", bare)
    return re.sub(r"(?<![0-9A-Za-z])\s+|\s+(?![0-9A-Za-z])", "", bare)


def is_word(text: str) -> bool:
    """True for a canonical answer that must be compared as text: in \\text{}, capitals only, or a long word."""
    if _WHOLE_TEXT.fullmatch(text.strip()):
        return True
    letters = squeeze(text)
    return letters.isascii() and letters.isalpha() and (len(letters) > 3 or (len(letters) > 1 and letters.isupper()))


def same_text(answer: str, gold: str) -> bool:
    """True for equal texts, spaces and wrappers ignored; words may differ in case, symbols not: `a` is not `A`."""
    a, b = squeeze(answer), squeeze(gold)
    if a == b:
        return bool(a)
    if len(a) < 2 or a.lower() != b.lower() or not a.replace(" ", "").isalpha():
        return False
    in_text = r"\text" in answer or r"\text" in gold
    return in_text or len(a) > 3 or a.lower() in _ANY_CASE


def same_choice(answer: str, gold: str) -> bool | None:
    """True if a marked choice, `(C) Paris`, has the other side's letter; None if the sides are no choice and letter."""
    for marked, other in ((answer, gold), (gold, answer)):
        choice = _MARKED.fullmatch(_TEXT.sub(r"\1", marked).strip())
        letter = squeeze(other)
        if choice and len(letter) == 1 and letter.isalpha() and _is_marked(marked, choice):
            return (choice[1] or choice[2]) == letter
    return None


def names_second_choice(rest: str) -> bool:
    """True if the text behind a choice's letter names a second choice: "or B", "Paris or (B) London", "B. C. D"."""
    return bool(_SECOND.match(rest) or _OR_LETTER.match(rest) or _LETTERS_ALONE.match(rest))


def _is_marked(text: str, choice: re.Match[str]) -> bool:
    """True if the letter marks a choice: before words, a space and a number, or with a dot; (C)x is a product."""
    if choice[3][0] in "+-*/=^_<>," or names_second_choice(choice[3]) or _REFUSED.match(choice[3]):
        return False
    number = re.search(r"\)\s+(?:\d|\\frac|\\sqrt)", text)
    return r"\text" in text or bool(choice[2] or number or re.search(r"[a-z]{3}", choice[3]))
