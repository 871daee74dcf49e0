"""Parses a LaTeX expression to sympy, with latex2sympy's grammar. Runs in a killable process only: it may never end.

Input that the grammar would silently misread (case, powers of i, primes, transposes, adjacent numbers) is rewritten or
refused. No input may reach `eval`: `restrict_string_parser` restricts sympy's string parser, the only way there.
"""

from __future__ import annotations

import re
from typing import Any

import sympy  # type: ignore[import-untyped]
from latex2sympy2_extended import latex2sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig

_KEEP_CASE = ConversionConfig(lowercase_symbols=False)  # by default `a` would be `A`
_HARMLESS = re.compile(r"(?:[0-9.+*/() -]|(?<=[0-9.])[eE](?=[+-]?[0-9])|sqrt|log|exp|pi)+|[A-Za-z]\w*", re.ASCII)
_SCIENTIFIC = re.compile(r"(?<![\w.])(\d+(?:\.\d*)?|\.\d+)[eE]([+-]?\d+)(?!\w)", re.ASCII)
_DECIMAL = re.compile(r"\d*\.\d+|\d+\.\d*", re.ASCII)
_IMAGINARY, _CAPITAL_I = r"\varsigma_{9i}", r"\varsigma_{9u}"  # the grammar drops the power of its own I
# The grammar reads \gamma as a function and knows no capitals: a subscript makes symbols of them.
_GREEK = re.compile(
    r"\\(gamma|Gamma|Delta|Lambda|Omega|Phi|Pi|Psi|Sigma|Theta|Upsilon|Xi)(?![a-zA-Z])(?:_\s*(?:\{(\w+)\}|(\w)))?"
)
_SHAPED = r"\\(?:hat|vec|bar|dot|ddot|tilde|overline|widehat|widetilde|overrightarrow|mathbf|mathcal|mathbb|boldsymbol)"
_TOKENS = re.compile(
    rf"(?:\\(?:text|begin|end|operatorname)|{_SHAPED})\s*\{{[^{{}}]*\}}|_\s*(?:\{{[^{{}}]*\}}|\w)|\\?[a-zA-Z]+"
)
_INDEX_I = re.compile(r"_\s*\{?\s*i(?![a-zA-Z])|(?<![a-zA-Z\\])i\s*=")
_ODD_ROOT = re.compile(r"\\sqrt\s*\[\s*(\d?[13579])\s*\]\s*\{")
_TRIGONOMETRY = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-zA-Z])")
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"\\%", r"\\times\\frac{1}{100}"),
        (r"\\text\s*\{\s*([ei])\s*\}", r"\1"),
        (r"(?<![\d.])\.(?=\d)", "0."),
        (r"\\ast(?![a-zA-Z])", "*"),
        (r"\\log\s*_\s*(\d)", r"\\log_{\1}"),
        (r"\\(angle|triangle|square)\s*([A-Z]{2,})(?![a-zA-Z])", r"\\text{\1\2}"),  # BCA is not ABC
        (r"(?<![a-zA-Z\\])([fgh])\s*\^\s*\{\s*-\s*1\s*\}\s*(?=\()", r"\1_{9v}"),  # an inverse function
        (r"([a-zA-Z])''", r"\1_{9pp}"),
        (r"([a-zA-Z])'", r"\1_{9p}"),
        (r"\^\s*(?:\{\s*T\s*\}|T(?![a-zA-Z]))", "^{(T)}"),
        (r"(?<![\d./^_])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\d(a-zA-Z])", r"(\1+\\frac{\2}{\3})"),
        (r"(?<![\w^_{.])(\d+)\s*(?=\(|\\binom)", r"\1\\cdot "),  # the grammar reads 2(3) as a mixed number
        (r"\)\s*\(", r")\\cdot("),
    ]
]
# Refused: primes and subscripts that the grammar drops, adjacent numbers, improper mixed numbers, double factorials.
_MISREAD = re.compile(
    r"'|(?<![\w}])\d+_|\d\s+\d|!\s*!|\\ldots|(?<![\w^_{])\d+\s*\\frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}|\\[pb]?mod"
)


def restrict_string_parser() -> None:
    """Make sympy's string parser, which evaluates Python, accept only arithmetic and single names from now on.

    latex2sympy's grammar needs it for numerals, nsimplify for arithmetic, sympy's lazy imports for names.
    """
    sympy_parser = sympy.parsing.sympy_parser
    parse_string = sympy_parser.parse_expr

    def only_harmless(text: str, *args: Any, **kwargs: Any) -> Any:
        if not _HARMLESS.fullmatch(text):
            raise sympy.SympifyError(f"{text[:40]!r}: only arithmetic is parsed from strings here")
        return parse_string(text, *args, **kwargs)

    sympy_parser.parse_expr = only_harmless


def read_expression(latex: str) -> Any:
    """Parse LaTeX to an evaluated sympy expression, matrix or set; decimals become exact fractions.

    Raises ValueError or latex2sympy's Exception for LaTeX that it cannot parse.
    """
    marks: dict[Any, Any] = {sympy.Symbol("varsigma_{9i}", real=True): sympy.I}
    text = _rewrite_for_grammar(latex, marks)
    parsed = latex2sympy(text, is_real=True, normalization_config=None, conversion_config=_KEEP_CASE)
    if isinstance(parsed, sympy.MatrixExpr):
        parsed = parsed.doit()
    if isinstance(parsed, bool) or not isinstance(parsed, sympy.Basic | sympy.MatrixBase):
        raise ValueError(f"{latex[:40]!r} is not an expression")
    exact = {number: sympy.Rational(str(number)) for number in parsed.atoms(sympy.Float)}
    value = parsed.xreplace(exact | marks)
    value = value.doit() if hasattr(value, "doit") else value
    if value.has(sympy.zoo, sympy.nan):  # sympy takes all divisions by zero as equal
        raise ValueError(f"{latex[:40]!r} divides by zero")
    return value


def count_significant_digits(latex: str) -> int:
    """Count the significant digits of the longest decimal in the text; 0 without a decimal."""
    return max((len(number.replace(".", "").lstrip("0")) for number in _DECIMAL.findall(latex)), default=0)


def _rewrite_for_grammar(latex: str, marks: dict[Any, Any]) -> str:
    """Rewrite LaTeX for the grammar. Placeholder symbols and the values that replace them are added to `marks`."""
    text = _SCIENTIFIC.sub(r"\1 \\times 10^{\2}", latex)
    text = text.replace(r"\text{ degrees}", r"\times\frac{\pi}{180}" if _TRIGONOMETRY.search(text) else "")
    while root := _ODD_ROOT.search(text):
        end = _closing_brace(text, root.end())
        radicand = read_expression(text[root.end() : end])
        name = f"9r{len(marks)}"
        # The real root: sympy's root of a negative number is complex.
        real_root = sympy.sign(radicand) * sympy.Abs(radicand) ** sympy.Rational(1, int(root[1]))
        marks[sympy.Symbol(f"varrho_{{{name}}}", real=True)] = real_root
        text = rf"{text[: root.start()]}\varrho_{{{name}}} {text[end + 1 :]}"
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    for match in _MISREAD.finditer(text):
        if not match[1] or int(match[1]) >= int(match[2]):
            raise ValueError(f"{latex[:40]!r}: {match[0]!r} is ambiguous")
    text = _GREEK.sub(lambda m: rf"\varrho_{{9{m[1]}{m[2] or m[3] or ''}}}", text)
    has_index = bool(_INDEX_I.search(text))
    return _TOKENS.sub(lambda token: _mark_letters(token[0], has_index), text)


def _mark_letters(token: str, has_index: bool) -> str:
    """Mark i as the imaginary unit, unless it is an index, and I as a letter; four or more letters become one name."""
    if not token.isalpha():
        return token
    if len(token) > 3:
        return rf"\text{{{token}}}"
    marks = {"I": f" {_CAPITAL_I} "} | ({} if has_index else {"i": f" {_IMAGINARY} "})
    return "".join(marks.get(letter, letter) for letter in token)


def _closing_brace(text: str, start: int) -> int:
    """The index of the brace that closes the one just before `start`. Raises ValueError if none does."""
    depth = 1
    for index in range(start, len(text)):
        depth += (text[index] == "{") - (text[index] == "}")
        if depth == 0:
            return index
    raise ValueError("a brace is not closed")
