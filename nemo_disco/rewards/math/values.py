"""Decides whether two sympy objects are equal: exactly, or to the digits of a decimal that has six or more.

A small difference is never taken for zero without proof. Runs in a killable process: it may take long.
"""

from __future__ import annotations

import random
from decimal import Decimal
from typing import Any

import sympy  # type: ignore[import-untyped]

from nemo_disco.rewards.math.fast_path import has_finite_decimal, same_digits

_PROOF_DIGITS = 600  # numbers that agree in so many digits are equal, unless they contain integers of similar length
_LONG_NUMBER = 1000  # bits of an integer that makes those digits no proof
_POINTS = 24  # values of the symbols at which two expressions are compared
_AGREEING = 4  # points at which two expressions must both be real and equal


def same_value(gold: Any, answer: Any, digits: int = 0) -> bool:
    """True if both are equal as numbers, functions of their symbols, matrices or sets.

    digits: significant digits to which a decimal may stand for an exact number; 0 allows none.
    """
    if isinstance(gold, sympy.MatrixBase) or isinstance(answer, sympy.MatrixBase):
        if not (isinstance(gold, sympy.MatrixBase) and isinstance(answer, sympy.MatrixBase)):
            return False
        pairs = zip(gold.flat(), answer.flat(), strict=False)
        return gold.shape == answer.shape and all(same_value(a, b, digits) for a, b in pairs)
    if not (isinstance(gold, sympy.Expr) and isinstance(answer, sympy.Expr)):
        return bool(gold == answer)
    if gold == answer:
        return True
    gold, answer = _functions_to_symbols(gold, answer)
    symbols = sorted(gold.free_symbols | answer.free_symbols, key=str)
    if symbols:
        return _same_function(gold, answer, symbols)
    return same_number(gold, answer) or _same_decimal(gold, answer, digits)


def same_number(a: Any, b: Any) -> bool:
    """True if two expressions without symbols are exactly equal."""
    if a == b:
        return True
    if a.is_infinite or b.is_infinite or (a.is_Rational and b.is_Rational):
        return False
    difference = a - b
    if difference.is_Rational:
        return bool(difference == 0)
    parts = difference.evalf(10, maxn=_PROOF_DIGITS).as_real_imag()
    if not all(part.is_Number for part in parts):
        return bool(sympy.simplify(difference) == 0)
    if any(part != 0 and getattr(part, "_prec", 2) > 1 for part in parts):  # a precision of 1: no digit is known
        return False
    numbers = a.atoms(sympy.Rational) | b.atoms(sympy.Rational)
    is_long = any(max(abs(n.p).bit_length(), n.q.bit_length()) > _LONG_NUMBER for n in numbers)
    return not is_long or bool(sympy.simplify(difference) == 0)


def _same_function(gold: Any, answer: Any, symbols: list[Any]) -> bool:
    """True if both are equal at each sample point where both are real; with few such points, at all sample points."""
    real, total = 0, 0
    for point in _sample_points(symbols):
        a, b = answer.xreplace(point).doit(), gold.xreplace(point).doit()
        if any(value.has(sympy.zoo, sympy.nan, sympy.oo) for value in (a, b)):
            continue
        if a.free_symbols or b.free_symbols:  # bound symbols of a sum or an integral that sympy leaves as it is
            return bool(sympy.simplify(gold - answer) == 0)
        both_real = _is_real(a) and _is_real(b)
        equal = same_number(a, b)
        if both_real and not equal:
            return False
        real += both_real
        total += equal
    return real >= _AGREEING or (total >= _AGREEING and _equal_everywhere(gold, answer, symbols))


def _equal_everywhere(gold: Any, answer: Any, symbols: list[Any]) -> bool:
    values = [(gold.xreplace(point).doit(), answer.xreplace(point).doit()) for point in _sample_points(symbols)]
    return all(same_number(a, b) for a, b in values if not (a - b).has(sympy.zoo, sympy.nan))


def _sample_points(symbols: list[Any]) -> list[dict[Any, Any]]:
    """Fixed values for the symbols: integers and fractions, small and large, positive and of both signs."""
    rng = random.Random(0)
    points = []
    for index in range(_POINTS):
        if index % 4 == 3:
            values = [sympy.Integer(rng.randint(1, 12)) for _ in symbols]
        else:
            size = (1, 3, 12)[index % 3]
            values = [sympy.Rational(rng.randint(1, 97 * size), 97) for _ in symbols]
        if index % 2:  # every pattern of signs of the first symbols
            values = [-value if (index // 2) >> i & 1 else value for i, value in enumerate(values)]
        points.append(dict(zip(symbols, values, strict=True)))
    return points


def _is_real(value: Any) -> bool:
    if value.is_real is not None:
        return bool(value.is_real)
    imaginary = value.evalf(10).as_real_imag()[1]
    return imaginary == 0 or getattr(imaginary, "_prec", 2) == 1


def _same_decimal(a: Any, b: Any, digits: int) -> bool:
    """True if the two agree to `digits` significant digits; False for 0 digits and for two finite decimals."""
    if not digits or all(value.is_Rational and has_finite_decimal(int(value.q)) for value in (a, b)):
        return False
    parts = zip(*(value.evalf(30).as_real_imag() for value in (a, b)), strict=True)  # real, imaginary
    try:
        return all(same_digits(Decimal(str(x)), Decimal(str(y)), digits) for x, y in parts)
    except ArithmeticError:  # not a number
        return False


def _functions_to_symbols(*expressions: Any) -> list[Any]:
    """The expressions with each unknown function's value, such as f(x), replaced by a symbol."""
    functions = set().union(*(e.atoms(sympy.core.function.AppliedUndef) for e in expressions))
    if not functions or any(e.has(sympy.Derivative) for e in expressions):
        return list(expressions)
    symbols = {f: sympy.Symbol(f"value of {f}", real=True) for f in functions}
    return [e.xreplace(symbols) for e in expressions]
