"""Functions that rewrite a gold answer's text: in another spelling, which is right, or with a wrong digit."""

from __future__ import annotations

import random
import re
from fractions import Fraction

from nemo_disco.rewards.math.canonical import canonicalize
from nemo_disco.rewards.math.fast_path import parse_numeral

_EXPRESSION = re.compile(r"(?:\\(?:frac|sqrt|pi|cdot|sin|cos|tan|log|ln)(?![a-zA-Z])|[0-9a-zA-Z+*/^(){} -])+")
_WORD = re.compile(r"\\text|\\mbox|[a-zA-Z]{2,}|[A-Z]")
_LIST = re.compile(r"[^,()\[\]\\]+(?:,[^,()\[\]\\]+)+")


def list_forms(gold: str) -> dict[str, str]:
    """The answer in other forms with the same meaning, by the form's name; doubtful forms are left out."""
    forms = {"style": respell(gold)}
    if (value := _value(gold)) is not None:
        over, under = value.numerator, value.denominator
        forms["fraction"] = rf"\frac{{{3 * over}}}{{{3 * under}}}"
        forms["arithmetic"] = rf"{over - 7 * under}/{under} + 7"
        if under == 1:
            forms["decimal"] = f"{over}.0"
            forms["thousands"] = f"{over:,}"
    elif _is_expression(gold):
        forms["halved twice"] = rf"\frac{{2\left({gold}\right)}}{{2}}"
        forms["plus nothing"] = rf"7 + {gold} - 7"
    elif _LIST.fullmatch(gold.strip().strip("$")) and not re.search(r"\d,\d{3}(?!\d)", gold):
        forms["other order"] = ",".join(reversed(gold.strip().strip("$").split(",")))
    if "pmatrix" in gold:
        forms["brackets"] = gold.replace("pmatrix", "bmatrix")
    return forms


def change_digit(gold: str, rng: random.Random) -> str:
    """Change one digit of the answer, or add 1 to an answer that has no digits."""
    digits = [match.start() for match in re.finditer(r"\d", gold)]
    if not digits:
        return gold + "+1"
    i = rng.choice(digits)
    return gold[:i] + str((int(gold[i]) + rng.randint(1, 9)) % 10) + gold[i + 1 :]


def respell(gold: str) -> str:
    """Write the answer in another LaTeX style: \\left and \\right, displayed fractions, more spaces, dollar signs."""
    plain = gold.strip().strip("$").replace(r"\left", "").replace(r"\right", "").replace(r"\frac", r"\dfrac")
    sized = plain.replace("(", r"\left(").replace(")", r"\right)")
    return "$ " + re.sub(r"([+=])", r" \1 ", sized) + " $"


def _value(gold: str) -> Fraction | None:
    """The answer's exact value, or None if it is not a plain number."""
    number = parse_numeral(canonicalize(gold))
    return number.value if number is not None and not number.percent else None


def _is_expression(gold: str) -> bool:
    """True for a single number or term: no words, no list, no relation, no letter that may name a choice."""
    plain = canonicalize(gold)
    commands = re.sub(r"\\[a-zA-Z]+", "", plain)
    return bool(_EXPRESSION.fullmatch(plain)) and not _WORD.search(commands) and len(plain) > 1
