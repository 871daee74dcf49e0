"""Decides plain answers exactly, in microseconds: the same text, or two numerals. All else takes algebra.

Numerals are compared as rational numbers: no false positives, no rounding. Needs the standard library alone.
"""

from __future__ import annotations

import re
from decimal import ROUND_DOWN, ROUND_HALF_UP, Context, Decimal
from fractions import Fraction
from typing import NamedTuple

from nemo_disco.rewards.math.canonical import based, canonical
from nemo_disco.rewards.math.units import quantity
from nemo_disco.rewards.math.words import is_word, same_choice, same_text, squeezed

MAX_NUMERAL = 400  # characters; Python refuses integers of over 4,300 digits, and none is an answer
MAX_EXPONENT = 400
SURE_DIGITS = 6  # a decimal with as many significant digits may stand for a number that has no finite decimal
FLOAT_DIGITS = 15  # what a computer's number has beyond these is rounding

_INTEGER = r"\d+|\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+"
_DECIMAL = rf"(?P<decimal>(?:{_INTEGER})?\.\d+|(?:{_INTEGER})\.?)"
_POWER = (
    r"(?:\s*(?:\\times|\\cdot|\*)\s*10\^(?:(?P<digit>\d)|\{\s*(?P<power>[+-]?\d+)\s*\})|[eE](?P<exponent>[+-]?\d+))?"
)
_FRACTION = (
    r"(?:(?P<whole>\d+)(?:\s*(?=\\frac)|\s+(?=\d+\s*/)))?"
    r"(?:\\frac\s*(?:\{\s*(?P<n1>-?\d+)\s*\}|(?P<n2>\d))\s*(?:\{\s*(?P<d1>\d+)\s*\}|(?P<d2>\d))|(?P<n3>\d+)\s*/\s*(?P<d3>\d+))"
)
_NUMERAL = re.compile(rf"(?P<sign>[+-]?)\s*(?:{_DECIMAL}{_POWER}|{_FRACTION})\s*(?P<percent>\\%)?", re.ASCII)
_REPEATING = re.compile(
    r"(?P<sign>-?)(?P<whole>\d*)\.(?:(?P<fixed>\d*)(?:\\(?:overline|bar|dot)\s*(?:\{\s*(?P<period>\d+)\s*\}|(?P<digit>\d))"
    r"|\((?P<round>\d+)\))|(?P<before>\d{0,9}?)(?P<again>\d{1,9})(?P=again){2,}\s*\\ldots)",
    re.ASCII,
)
_PLAIN = re.compile(r"-?\d{1,40}", re.ASCII)


class Numeral(NamedTuple):
    value: Fraction  # of the number before a percent sign
    percent: bool
    digits: int  # significant digits of a decimal; 0 for a fraction


def same(answer: str, gold: str) -> bool | None:
    """Whether the answer is the gold answer; None if that takes algebra to tell."""
    if _PLAIN.fullmatch(answer) and _PLAIN.fullmatch(gold):
        return int(answer) == int(gold)
    if (ours_plain := numeral(answer)) and (
        theirs_plain := numeral(gold)
    ):  # without any re-spelling, which takes longer
        return _same_numeral(ours_plain, theirs_plain)
    answer, gold = canonical(answer), canonical(gold)
    if same_text(answer, gold):
        return True
    if (choice := same_choice(answer, gold)) is not None:
        return choice
    ours, theirs = quantity(answer), quantity(gold)
    if ours.differs_in_unit(theirs):
        return False
    if same_text(ours.body, theirs.body):
        return True
    if is_word(gold) and is_word(answer):
        return False
    one, other = numeral(ours.body), numeral(theirs.body)
    if one and other:
        return _same_numeral(one, other)
    return True if _same_list(ours.body, theirs.body) else _same_in_base(ours.body, theirs.body)


def numeral(text: str) -> Numeral | None:
    """The exact value of a canonical integer, decimal, power of ten, fraction or mixed number; else None."""
    if len(text) > MAX_NUMERAL:
        return None
    if repeating := _REPEATING.fullmatch(text):
        return _repeating(repeating)
    if not (match := _NUMERAL.fullmatch(text)):
        return None
    if match["decimal"]:
        power = int(match["digit"] or match["power"] or match["exponent"] or 0)
        if abs(power) > MAX_EXPONENT:
            return None
        decimal = match["decimal"].replace(",", "").replace(" ", "")
        value = Fraction(decimal) * Fraction(10) ** power
        digits = len(decimal.replace(".", "").lstrip("0")) if "." in decimal else 0
    else:
        fraction = _fraction(match)
        if fraction is None:
            return None
        value, digits = fraction, 0
    return Numeral(-value if match["sign"] == "-" else value, bool(match["percent"]), digits)


def _repeating(match: re.Match[str]) -> Numeral:
    """0.1\\overline{6}, or 0.1666...: the digits to the first period's end, less those before it, over 99...900...0."""
    fixed = match["fixed"] or match["before"] or ""
    period = match["period"] or match["digit"] or match["round"] or match["again"]
    difference = int(match["whole"] + fixed + period) - int(match["whole"] + fixed or "0")
    value = Fraction(difference, (10 ** len(period) - 1) * 10 ** len(fixed))
    return Numeral(-value if match["sign"] else value, False, 0)


def _fraction(match: re.Match[str]) -> Fraction | None:
    """A fraction or mixed number; None where LaTeX could mean a product, and for a zero denominator."""
    over = int(match["n1"] or match["n2"] or match["n3"])
    under = int(match["d1"] or match["d2"] or match["d3"])
    if under == 0:
        return None
    if match["whole"] is None:
        return Fraction(over, under)
    return int(match["whole"]) + Fraction(over, under) if 0 < over < under else None


def _same_numeral(answer: Numeral, gold: Numeral) -> bool:
    if answer.percent == gold.percent:
        return _same_value(answer, gold)
    # 80% is 0.8, and 80 where the question asks for per cent; but 0.5 and 0.5% are both plausible, and differ.
    percent, bare = (answer, gold) if answer.percent else (gold, answer)
    as_percent = bare._replace(value=100 * bare.value)
    return _same_value(percent, as_percent) or (abs(bare.value) >= 1 and _same_value(percent, bare))


def _same_value(one: Numeral, other: Numeral) -> bool:
    if one.value == other.value:
        return True
    if terminates(one.value.denominator) and terminates(other.value.denominator):
        return False
    places = Context(prec=2 * FLOAT_DIGITS)
    ours, theirs = (places.divide(Decimal(n.value.numerator), Decimal(n.value.denominator)) for n in (one, other))
    return same_digits(ours, theirs, sure_digits(one.digits, other.digits))


def sure_digits(one: int, other: int) -> int:
    """The significant digits to which two numbers must agree, of the decimals in each; 0 if that does not do."""
    return min((digits for digits in (one, other) if digits >= SURE_DIGITS), default=0)


def same_digits(one: Decimal, other: Decimal, digits: int) -> bool:
    """Whether one is the other rounded, or cut off, to so many significant digits; never to none.

    So 33.3333 is 100/3, and so are 33.33333 and 33.333333333333336, but neither 33.3334 nor 33.33334.
    """
    if not digits:
        return False
    rounded, cut = (Context(min(digits, FLOAT_DIGITS), how).plus for how in (ROUND_HALF_UP, ROUND_DOWN))
    return rounded(one) == rounded(other) or cut(one) == rounded(other) or rounded(one) == cut(other)


def terminates(denominator: int) -> bool:
    """Whether a fraction in lowest terms has a finite decimal: its denominator divides a power of ten."""
    return denominator == 1 or pow(10, denominator.bit_length(), denominator) == 0


def _same_list(answer: str, gold: str) -> bool:
    """The same items between top-level commas, in any order; brackets, dots and labels give the order a meaning."""
    if "," not in answer or any(mark in answer + gold for mark in ("(", "[", "|", r"\ldots", "=")):
        return False
    if numeral(answer) or numeral(gold):  # 1,234 is one number
        return False
    ours, theirs = (sorted(squeezed(item) for item in text.split(",")) for text in (answer, gold))
    return ours == theirs and all(ours)


def _same_in_base(answer: str, gold: str) -> bool | None:
    """4343 is 4343_6, its base left out, but 4343_6 is neither 4343_7 nor 4343; None if it takes more to tell."""
    ours, theirs = based(answer), based(gold)
    if ours and theirs:
        return ours == theirs
    return True if (theirs and theirs[0] == answer) or ours == (gold, "10") else None
