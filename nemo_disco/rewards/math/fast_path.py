"""Decides in microseconds whether plain answers are equal: the same text, or two numerals. The rest takes algebra.

Numerals are compared as rational numbers: no false positives, no rounding. Imports the standard library alone.
"""

from __future__ import annotations

import re
from decimal import ROUND_DOWN, ROUND_HALF_UP, Context, Decimal
from fractions import Fraction
from typing import NamedTuple

from nemo_disco.rewards.math.canonical import canonicalize, split_base
from nemo_disco.rewards.math.units import split_unit
from nemo_disco.rewards.math.words import is_word, same_choice, same_text, squeeze

MAX_NUMERAL = 400  # characters; no answer is longer, and Python refuses integers of over 4,300 digits
MAX_EXPONENT = 400
SURE_DIGITS = 6  # a decimal of at least so many significant digits may be a rounded value, such as 0.333333 for 1/3
FLOAT_DIGITS = 15  # significant digits of a float64; later digits of a decimal are rounding errors

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
_SHORT_INTEGER = re.compile(r"-?\d{1,40}", re.ASCII)


class Numeral(NamedTuple):
    value: Fraction  # of the number in front of the percent sign, if there is one
    percent: bool
    digits: int  # significant digits of a decimal; 0 for a fraction


def decide(answer: str, gold: str) -> bool | None:
    """True if the answer equals the gold answer, False if it does not, None if only algebra can tell."""
    if _SHORT_INTEGER.fullmatch(answer) and _SHORT_INTEGER.fullmatch(gold):
        return int(answer) == int(gold)
    if (number := parse_numeral(answer)) and (gold_number := parse_numeral(gold)):  # canonicalize() takes longer
        return _same_numeral(number, gold_number)
    answer, gold = canonicalize(answer), canonicalize(gold)
    if same_text(answer, gold):
        return True
    if (choice := same_choice(answer, gold)) is not None:
        return choice
    a, b = split_unit(answer), split_unit(gold)
    if a.differs_in_unit(b):
        return False
    if same_text(a.body, b.body):
        return True
    if is_word(gold) and is_word(answer):
        return False
    if (number := parse_numeral(a.body)) and (gold_number := parse_numeral(b.body)):
        return _same_numeral(number, gold_number)
    return True if _same_list(a.body, b.body) else _same_in_base(a.body, b.body)


def parse_numeral(text: str) -> Numeral | None:
    """Parse a canonical integer, decimal, power of ten, fraction or mixed number exactly; None for other texts."""
    if len(text) > MAX_NUMERAL:
        return None
    if repeating := _REPEATING.fullmatch(text):
        return _parse_repeating(repeating)
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
        fraction = _parse_fraction(match)
        if fraction is None:
            return None
        value, digits = fraction, 0
    return Numeral(-value if match["sign"] == "-" else value, bool(match["percent"]), digits)


def _parse_repeating(match: re.Match[str]) -> Numeral:
    """The value of a repeating decimal, 0.1\\overline{6} or 0.1666...: here (16 - 1)/90."""
    fixed = match["fixed"] or match["before"] or ""
    period = match["period"] or match["digit"] or match["round"] or match["again"]
    difference = int(match["whole"] + fixed + period) - int(match["whole"] + fixed or "0")
    value = Fraction(difference, (10 ** len(period) - 1) * 10 ** len(fixed))
    return Numeral(-value if match["sign"] else value, False, 0)


def _parse_fraction(match: re.Match[str]) -> Fraction | None:
    """The value of a fraction or mixed number; None for a product such as 2\\frac{5}{2}, and a zero denominator."""
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
    # 80% equals 0.8, and 80 if the question asks for per cent; but 0.5% is not 0.5, since either may be meant.
    percent, bare = (answer, gold) if answer.percent else (gold, answer)
    as_percent = bare._replace(value=100 * bare.value)
    return _same_value(percent, as_percent) or (abs(bare.value) >= 1 and _same_value(percent, bare))


def _same_value(a: Numeral, b: Numeral) -> bool:
    if a.value == b.value:
        return True
    if has_finite_decimal(a.value.denominator) and has_finite_decimal(b.value.denominator):
        return False
    context = Context(prec=2 * FLOAT_DIGITS)
    x, y = (context.divide(Decimal(n.value.numerator), Decimal(n.value.denominator)) for n in (a, b))
    return same_digits(x, y, required_digits(a.digits, b.digits))


def required_digits(a: int, b: int) -> int:
    """The number of digits to which two decimals of `a` and `b` significant digits must agree; 0 if both are short."""
    return min((digits for digits in (a, b) if digits >= SURE_DIGITS), default=0)


def same_digits(a: Decimal, b: Decimal, digits: int) -> bool:
    """True if the two agree when either is rounded or cut off to `digits` significant digits; False for 0 digits.

    So 33.3333 is 100/3, and so are 33.33333 and 33.333333333333336, but neither 33.3334 nor 33.33334.
    """
    if not digits:
        return False
    rounded, cut = (Context(min(digits, FLOAT_DIGITS), mode).plus for mode in (ROUND_HALF_UP, ROUND_DOWN))
    return rounded(a) == rounded(b) or cut(a) == rounded(b) or rounded(a) == cut(b)


def has_finite_decimal(denominator: int) -> bool:
    """True if a fraction in lowest terms has a finite decimal: its denominator divides a power of ten."""
    return denominator == 1 or pow(10, denominator.bit_length(), denominator) == 0


def _same_list(answer: str, gold: str) -> bool:
    """True for the same items between commas, in any order. False where brackets, dots or labels may fix an order."""
    if "," not in answer or any(mark in answer + gold for mark in ("(", "[", "|", r"\ldots", "=")):
        return False
    if parse_numeral(answer) or parse_numeral(gold):  # 1,234 is one number
        return False
    items, gold_items = (sorted(squeeze(item) for item in text.split(",")) for text in (answer, gold))
    return items == gold_items and all(items)


def _same_in_base(answer: str, gold: str) -> bool | None:
    """Compare numerals with bases: 4343 equals the gold 4343_6 but 4343_7 does not; None if only algebra can tell."""
    digits_and_base, gold_digits_and_base = split_base(answer), split_base(gold)
    if digits_and_base and gold_digits_and_base:
        return digits_and_base == gold_digits_and_base
    without_base = gold_digits_and_base is not None and gold_digits_and_base[0] == answer
    return True if without_base or digits_and_base == (gold, "10") else None
