"""Answers that are words or letters and no mathematics: `ABC` is a sequence of points, not a product.

Pure string work on canonical answers.
"""

from __future__ import annotations

import re

# Short words that count in any case; longer ones, and those in \\text{}, always do.
_ANY_CASE = {"no", "yes", "odd", "all", "tie", "even", "true", "both", "none"}
_TEXT = re.compile(r"\\text\s*\{\s*((?:[^{}]|\{[^{}]*\})*?)\s*\}")
_WHOLE_TEXT = re.compile(r"\\text\s*\{[^{}]*\}")
_MARKED = re.compile(r"(?:\(\s*([A-Z])\s*\)|([A-Z])\s*[.):])\s*(\S.*)", re.DOTALL)

# A second choice behind the first one: "Paris or (B) London". "Both (A) and (B)" is the text of a choice.
_SECOND = re.compile(
    r"(?!\s*(?i:both|either|neither|all|none|only)\b).*?(?:\b(?:or|and)\b|\\lor|[,;])\s*(?:\([A-Z]\)|[A-Z][.):])",
    re.DOTALL,
)
_OR_LETTER = re.compile(r"\s*(?:or|and|\\lor|,)\s*[A-Z]\s*$")
LETTERS_ALONE = r"(?:[\s().:]*[A-J](?!\w))+[\s().:]*\Z"  # A. B. C. D
_LETTERS_ALONE, _REFUSED = re.compile(LETTERS_ALONE), re.compile(r"is\s+(?:not|wrong|false|incorrect)\b")


def squeezed(text: str) -> str:
    """Canonical text without the spaces and wrappers that only typesetting needs; for comparing, not for parsing."""
    bare = _TEXT.sub(r" \1 ", text)
    bare = re.sub(r"^\s*\(?\s*([A-Za-z])\s*\)\s*$", r"\1", bare)  # the choice (C), or C)
    bare = re.sub(r"([_^])\s*\{\s*([0-9A-Za-z])\s*\}", r"\1\2", bare)
    return re.sub(r"(?<![0-9A-Za-z])\s+|\s+(?![0-9A-Za-z])", "", bare)


def is_word(text: str) -> bool:
    """Whether a canonical answer is to be compared letter by letter: in \\text{}, in capitals, or a long word."""
    if _WHOLE_TEXT.fullmatch(text.strip()):
        return True
    letters = squeezed(text)
    return letters.isascii() and letters.isalpha() and (len(letters) > 3 or (len(letters) > 1 and letters.isupper()))


def same_text(answer: str, gold: str) -> bool:
    """The same text, spaces and wrappers apart; words in any case, symbols not: `a` is not `A`."""
    ours, theirs = squeezed(answer), squeezed(gold)
    if ours == theirs:
        return bool(ours)
    if len(ours) < 2 or ours.lower() != theirs.lower() or not ours.replace(" ", "").isalpha():
        return False
    in_text = r"\text" in answer or r"\text" in gold
    return in_text or len(ours) > 3 or ours.lower() in _ANY_CASE


def same_choice(answer: str, gold: str) -> bool | None:
    """Whether `(C) Paris` names the choice C; None where neither side is a marked choice and the other one letter."""
    for marked, other in ((answer, gold), (gold, answer)):
        choice = _MARKED.fullmatch(_TEXT.sub(r"\1", marked).strip())
        letter = squeezed(other)
        if choice and len(letter) == 1 and letter.isalpha() and _is_marked(marked, choice):
            return (choice[1] or choice[2]) == letter
    return None


def names_another(rest: str) -> bool:
    """Whether what follows a choice's letter names a second choice: "or B", "Paris or (B) London", "B. C. D"."""
    return bool(_SECOND.match(rest) or _OR_LETTER.match(rest) or _LETTERS_ALONE.match(rest))


def _is_marked(text: str, choice: re.Match[str]) -> bool:
    """(C)x is a product, (C)+1 a sum; before words, a number set off by a space, or with a dot, it is a choice."""
    if choice[3][0] in "+-*/=^_<>," or names_another(choice[3]) or _REFUSED.match(choice[3]):
        return False
    number = re.search(r"\)\s+(?:\d|\\frac|\\sqrt)", text)
    return r"\text" in text or bool(choice[2] or number or re.search(r"[a-z]{3}", choice[3]))
