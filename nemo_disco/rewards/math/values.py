"""Whether two sympy objects are the same: exactly, but for a decimal, which stands for a number from six digits on.

Differences are refuted by numbers and never accepted because they are small. Runs inside a worker: it may take long.
"""

from __future__ import annotations

import random
from decimal import Decimal
from typing import Any

import sympy  # type: ignore[import-untyped]

from nemo_disco.rewards.math.fast_path import same_digits, terminates

_PROOF_DIGITS = 600  # two numbers that agree in so many are equal, unless they are written with numbers nearly as long
_LONG_NUMBER = 1000  # bits
_POINTS = 24
_AGREEING = 4  # points at which two expressions must both be real and equal


def same_value(gold: Any, answer: Any, digits: int = 0) -> bool:
    """Whether both are equal as numbers, functions of their symbols, matrices or sets.

    digits: significant ones of a decimal that may stand for an exact number; 0 if neither is one.
    """
    if isinstance(gold, sympy.MatrixBase) or isinstance(answer, sympy.MatrixBase):
        if not (isinstance(gold, sympy.MatrixBase) and isinstance(answer, sympy.MatrixBase)):
            return False
        pairs = zip(gold.flat(), answer.flat(), strict=False)
        return gold.shape == answer.shape and all(same_value(one, other, digits) for one, other in pairs)
    if not (isinstance(gold, sympy.Expr) and isinstance(answer, sympy.Expr)):
        return bool(gold == answer)
    if gold == answer:
        return True
    gold, answer = _with_letters_for_functions(gold, answer)
    symbols = sorted(gold.free_symbols | answer.free_symbols, key=str)
    if symbols:
        return _same_function(gold, answer, symbols)
    return same_number(gold, answer) or _same_decimal(gold, answer, digits)


def same_number(one: Any, other: Any) -> bool:
    """Whether two expressions without symbols are equal, exactly."""
    if one == other:
        return True
    if one.is_infinite or other.is_infinite or (one.is_Rational and other.is_Rational):
        return False
    difference = one - other
    if difference.is_Rational:
        return bool(difference == 0)
    parts = difference.evalf(10, maxn=_PROOF_DIGITS).as_real_imag()
    if not all(part.is_Number for part in parts):
        return bool(sympy.simplify(difference) == 0)
    if any(part != 0 and getattr(part, "_prec", 2) > 1 for part in parts):  # a precision of 1: no digit is known
        return False
    numbers = one.atoms(sympy.Rational) | other.atoms(sympy.Rational)
    is_long = any(max(abs(n.p).bit_length(), n.q.bit_length()) > _LONG_NUMBER for n in numbers)
    return not is_long or bool(sympy.simplify(difference) == 0)


def _same_function(gold: Any, answer: Any, symbols: list[Any]) -> bool:
    """Equal at every sampled point where both are real; if there are hardly any such points, at all points."""
    real, total = 0, 0
    for point in _points(symbols):
        ours, theirs = answer.xreplace(point).doit(), gold.xreplace(point).doit()
        if any(value.has(sympy.zoo, sympy.nan, sympy.oo) for value in (ours, theirs)):
            continue
        if ours.free_symbols or theirs.free_symbols:  # a sum or an integral with bound symbols in the way
            return bool(sympy.simplify(gold - answer) == 0)
        both_real = _is_real(ours) and _is_real(theirs)
        equal = same_number(ours, theirs)
        if both_real and not equal:
            return False
        real += both_real
        total += equal
    return real >= _AGREEING or (total >= _AGREEING and _equal_everywhere(gold, answer, symbols))


def _equal_everywhere(gold: Any, answer: Any, symbols: list[Any]) -> bool:
    values = [(gold.xreplace(point).doit(), answer.xreplace(point).doit()) for point in _points(symbols)]
    return all(same_number(one, other) for one, other in values if not (one - other).has(sympy.zoo, sympy.nan))


def _points(symbols: list[Any]) -> list[dict[Any, Any]]:
    """Values for the symbols: whole, positive and of both signs; small and large; always the same ones."""
    rng = random.Random(0)
    points = []
    for index in range(_POINTS):
        if index % 4 == 3:
            values = [sympy.Integer(rng.randint(1, 12)) for _ in symbols]
        else:
            size = (1, 3, 12)[index % 3]
            values = [sympy.Rational(rng.randint(1, 97 * size), 97) for _ in symbols]
        if index % 2:  # every pattern of signs of the first symbols
            values = [-value if (index // 2) >> place & 1 else value for place, value in enumerate(values)]
        points.append(dict(zip(symbols, values, strict=True)))
    return points


def _is_real(value: Any) -> bool:
    if value.is_real is not None:
        return bool(value.is_real)
    imaginary = value.evalf(10).as_real_imag()[1]
    return imaginary == 0 or getattr(imaginary, "_prec", 2) == 1


def _same_decimal(one: Any, other: Any, digits: int) -> bool:
    """Whether one is the other's decimal, of so many digits; two finite decimals are compared exactly instead."""
    if not digits or all(value.is_Rational and terminates(int(value.q)) for value in (one, other)):
        return False
    ours, theirs = (value.evalf(30).as_real_imag() for value in (one, other))
    try:
        pairs = zip(ours, theirs, strict=True)
        return all(same_digits(Decimal(str(a)), Decimal(str(b)), digits) for a, b in pairs)
    except ArithmeticError:  # not a number
        return False


def _with_letters_for_functions(*expressions: Any) -> list[Any]:
    """Each unknown function's value, such as f(x), as a symbol of its own."""
    applied = set().union(*(e.atoms(sympy.core.function.AppliedUndef) for e in expressions))
    if not applied or any(e.has(sympy.Derivative) for e in expressions):
        return list(expressions)
    letters = {f: sympy.Symbol(f"value of {f}", real=True) for f in applied}
    return [e.xreplace(letters) for e in expressions]
