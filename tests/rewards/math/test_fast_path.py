"""The fast path must be exact, since no later check sees an answer that it decides."""

from __future__ import annotations

import subprocess
import sys
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_disco.rewards.math.canonical import canonicalize
from nemo_disco.rewards.math.fast_path import decide, parse_numeral
from nemo_disco.rewards.math.units import strip_unit
from nemo_disco.rewards.math.words import squeeze

untimed = settings(deadline=None)  # a deadline by the clock fails on a busy machine
FRACTIONS = st.fractions(min_value=-1000, max_value=1000, max_denominator=1000)


def spellings(value: Fraction) -> list[str]:
    """The fraction as text and in two LaTeX styles."""
    sign, over, under = "-" if value < 0 else "", abs(value.numerator), value.denominator
    return [f"{sign}{over}/{under}", rf"{sign}\frac{{{over}}}{{{under}}}", rf"$ {sign}\dfrac{{{over}}}{{{under}}} $"]


@untimed
@given(FRACTIONS, FRACTIONS)
def test_fractions_are_equal_exactly_when_their_values_are(a: Fraction, b: Fraction) -> None:
    for answer in spellings(a):
        for gold in spellings(b):
            assert decide(answer, gold) is (a == b)


@untimed
@given(st.integers(-(10**12), 10**12), st.integers(0, 8))
def test_decimals_with_separators_and_powers_of_ten(digits: int, places: int) -> None:
    value = Fraction(digits, 10**places)
    plain = f"{'-' if digits < 0 else ''}{abs(digits) // 10**places}.{abs(digits) % 10**places:0{max(places, 1)}d}"
    plain = plain if places else str(digits)
    whole, _, rest = plain.partition(".")
    separated = f"{int(whole):,}" if not plain.startswith("-0") else whole
    for spelling in (
        plain,
        separated + (f".{rest}" if rest else ""),
        rf"{digits} \times 10^{{-{places}}}",
        f"{digits}e-{places}",
    ):
        numeral = parse_numeral(canonicalize(spelling))
        assert numeral is not None
        assert numeral.value == value


@pytest.mark.parametrize(
    ("answer", "gold", "decision"),
    [
        ("0.3333", r"\frac{1}{3}", False),
        ("0.333333", r"\frac{1}{3}", True),  # six significant digits
        ("0.125", r"\frac{1}{8}", True),
        ("0.1250001", r"\frac{1}{8}", False),
        ("3e-9", "2e-9", False),
        ("1 2", "12", None),
        ("12 12", "1212", None),
        ("3, 456", "3456", None),  # a list
        ("3,456", "3456", True),
        ("1,23", "123", None),
        (r"2\frac{1}{2}", "2.5", True),
        (r"-2\frac{1}{2}", "-2.5", True),
        (r"2\frac{5}{2}", "4.5", None),  # a product, or an improper mixed number
        (r"\frac{1}{0}", "0", None),
        ("80\\%", "0.8", True),
        ("80\\%", "80", True),
        ("0.5\\%", "0.5", False),
        ("4343_6", "4343_{6}", True),
        ("4343_6", "4343_7", False),
        ("4343", "4343_6", True),
        ("2", "10_2", None),
        ("25_8", "25", None),
        ("25_{10}", "25", True),
        (r"5\text{ cm}", r"5\text{ m}", False),
        (r"5\text{ cm}^2", r"5\text{ cm}^3", False),
        (r"5\text{ square cm}", r"5\mbox{ cm}^2", True),
        (r"5 \text{ apples}", "5", True),
        (r"2\text{ million}", "2", False),
        (r"2\text{ million}", "2,000,000", True),
        (r"x\text{ is even}", r"x\text{ is odd}", None),
        ("6m", "6", None),
        ("\N{MINUS SIGN}3", "-3", True),
        ("12", "\N{ARABIC-INDIC DIGIT ONE}\N{ARABIC-INDIC DIGIT TWO}", None),
        ("1" * 5000, "2" * 5000, None),  # over Python's limit for integers
        ("1e999999999", "1e999999998", None),  # over MAX_EXPONENT: too long to expand
    ],
)
def test_decisions(answer: str, gold: str, decision: bool | None) -> None:
    assert decide(answer, gold) is decision


ANSWERS = st.text(alphabet="012345.,/\\{}$%^_ ifractextcm+-", max_size=30)


@untimed
@given(ANSWERS, ANSWERS)
def test_decisions_are_reflexive_and_symmetric(a: str, b: str) -> None:
    """A base is the exception from the symmetry: only the answer may leave it out."""
    assert decide(a, a) is True or not squeeze(canonicalize(a))
    assert decide(a, b) is decide(b, a) or "_" in a + b
    strip_unit(a)


def test_two_thousand_plain_answers_a_second() -> None:
    """The rate per second of CPU time on one core; the grader promises it for two cores."""
    cases = [(str(i), str(i + i % 2)) for i in range(1000)]
    cases += [(f"{i}.50", rf"{i}\frac{{1}}{{2}}") for i in range(1000)]
    cases += [(f"{i:,}", rf"\${i}") for i in range(5000, 6000)]
    start = time.process_time()
    assert sum(bool(decide(answer, gold)) for answer, gold in cases) == 2500
    assert time.process_time() - start < len(cases) / 2000


def test_the_callers_process_stays_light() -> None:
    """`import nemo_disco` and the fast path must not import sympy."""
    code = (
        "import sys; from nemo_disco.rewards import MathGrader; "
        "assert MathGrader().grade([r'\\boxed{1/2}'], ['0.5']) == [1.0]; "
        "assert not {'sympy', 'math_verify', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
