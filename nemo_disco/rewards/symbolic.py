"""Whether two LaTeX answers are equal in mathematics, by math-verify. Runs inside a worker only: it may take for ever.

Nothing from outside may reach `eval`: the one road there, sympy's parser of strings, is closed to all but arithmetic.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from typing import Any

import sympy  # type: ignore[import-untyped]
from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify

from nemo_disco.rewards import verdict

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time limit is off: the pool has one

# No expression extraction: it would take a number out of a sentence for the answer, and evaluates Python.
# No units: math-verify takes any last letter m, s, c, ... for one, so that 6m would be 6; canonical.py knows better.
_LATEX = LatexExtractionConfig(
    boxed_match_priority=-1,
    normalization_config=NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none", equations=False
    ),
)
_HARMLESS = re.compile(r"(?:[0-9.+*/() -]|(?<=[0-9.])[eE](?=[+-]?[0-9])|sqrt|log|exp|pi)+|[A-Za-z]\w*", re.ASCII)
_DIGITS = 6  # significant digits that a decimal must share with the exact value that it stands for
_PRECISION = 15  # decimal digits, for comparing two exact numbers


def close_eval() -> None:
    """From here on sympy's string parser, which evaluates Python, takes arithmetic or one bare name only.

    math-verify gives it numerals, nsimplify arithmetic, and sympy's lazily imported modules names.
    """
    sympy_parser = sympy.parsing.sympy_parser
    parse_string = sympy_parser.parse_expr

    def only_harmless(text: str, *args: Any, **kwargs: Any) -> Any:
        if not _HARMLESS.fullmatch(text):
            raise sympy.SympifyError(f"{text[:40]!r}: only arithmetic is parsed from strings here")
        return parse_string(text, *args, **kwargs)

    sympy_parser.parse_expr = only_harmless


def judge(answer: str, golds: Sequence[str]) -> str:
    """The reason of the verdict: correct if the answer equals any of the golds (all canonical, without units).

    Depends on its arguments alone: sympy's random numbers are seeded and its cache is cleared each time.
    """
    sympy.core.random.seed(0)
    sympy.core.cache.clear_cache()
    ours = _parse(answer)
    if ours is None:
        return verdict.UNPARSABLE
    parsed = [gold for gold in map(_parse, golds) if gold is not None]
    if any(_equal(gold, ours) for gold in parsed):
        return verdict.CORRECT
    return verdict.WRONG if parsed else verdict.UNPARSABLE_GOLD


def _parse(latex: str) -> Any | None:
    """The sympy object that the LaTeX means; None if it is not understood."""
    found = parse(f"${latex}$", [_LATEX], fallback_mode="no_fallback", parsing_timeout=None)
    # zoo, nan: a division by zero, equal to every other one
    return found[0] if found and not getattr(found[0], "has", lambda *_: False)(sympy.zoo, sympy.nan) else None


def _equal(gold: Any, answer: Any) -> bool:
    zeros = _leading_zeros(gold)
    equal = verify(
        gold,
        answer,
        float_rounding=_DIGITS + zeros,
        numeric_precision=_PRECISION + zeros,
        allow_set_relation_comp=True,
        timeout_seconds=None,
    )
    return equal and not _both_without_solution(gold, answer)


def _both_without_solution(gold: Any, answer: Any) -> bool:
    """Whether they are different equations that nothing solves: to math-verify, by their solutions, those are equal."""
    if not (isinstance(gold, sympy.Eq) and isinstance(answer, sympy.Eq)):
        return False
    sides = (gold.lhs, gold.rhs, answer.lhs, answer.rhs)
    if not all(isinstance(side, sympy.Expr) for side in sides):  # x = {1, 2}
        return False
    ours, theirs = answer.lhs - answer.rhs, gold.lhs - gold.rhs
    if any(sympy.simplify(theirs - sign * ours) == 0 for sign in (1, -1)):
        return False
    return not sympy.solve(gold, gold.free_symbols)


def _leading_zeros(gold: Any) -> int:
    """Zeros between the gold's decimal point and first digit: math-verify rounds absolutely, 2e-9 would equal 3e-9."""
    try:
        size = abs(gold.evalf(5))
        return max(0, -1 - math.floor(float(sympy.log(size, 10)))) if size.is_positive else 0
    except (AttributeError, TypeError, ValueError, OverflowError):
        return 0  # not one number: a set, a matrix, an expression in x
