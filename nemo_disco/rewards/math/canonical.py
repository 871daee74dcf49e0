"""Rewrites an answer in one spelling: characters, LaTeX's spacing and sizes, markdown, bare function names.

Applied to the answer and the gold answer alike. String processing: nothing is evaluated.
"""

from __future__ import annotations

import re
import unicodedata

_LATEX = {
    "\N{MULTIPLICATION SIGN}": r"\times ",
    "\N{DIVISION SIGN}": r"\div ",
    "\N{MIDDLE DOT}": r"\cdot ",
    "\N{DOT OPERATOR}": r"\cdot ",
    "\N{DEGREE SIGN}": r"^\circ ",
    "\N{INFINITY}": r"\infty ",
    "\N{LESS-THAN OR EQUAL TO}": r"\le ",
    "\N{GREATER-THAN OR EQUAL TO}": r"\ge ",
    "\N{NOT EQUAL TO}": r"\ne ",
    "\N{PLUS-MINUS SIGN}": r"\pm ",
    "\N{UNION}": r"\cup ",
    "\N{INTERSECTION}": r"\cap ",
    "\N{SET MINUS}": r"\setminus ",
    "\N{ELEMENT OF}": r"\in ",
    "\N{EMPTY SET}": r"\emptyset ",
    "\N{LATIN CAPITAL LETTER O WITH STROKE}": r"\emptyset ",
    "\N{ALMOST EQUAL TO}": r"\approx ",
    "\N{LOGICAL OR}": r"\lor ",
    "\N{HORIZONTAL ELLIPSIS}": r"\ldots ",
    "\N{MIDLINE HORIZONTAL ELLIPSIS}": r"\ldots ",
    **{unicodedata.lookup(f"DOUBLE-STRUCK CAPITAL {letter}"): rf"\mathbb{{{letter}}}" for letter in "CNQRZ"},
    "\N{ANGLE}": r"\angle ",
    "\N{WHITE UP-POINTING TRIANGLE}": r"\triangle ",
    "\N{FRACTION SLASH}": "/",
    "\N{CENT SIGN}": r"\text{ cents}",
    "\N{EURO SIGN}": r"\euro ",
    "\N{POUND SIGN}": r"\pounds ",
    "\N{YEN SIGN}": r"\yen ",
    "\N{MINUS SIGN}": "-",
    "\N{EN DASH}": "-",
    "\N{FULLWIDTH HYPHEN-MINUS}": "-",
    "\N{NO-BREAK SPACE}": " ",
    **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff", ""),  # zero width
    "\N{GREEK CAPITAL LETTER OMEGA}": r"\Omega ",
}
_GREEK = "alpha beta gamma delta epsilon zeta eta theta kappa mu nu xi pi rho sigma tau phi chi psi omega"
_LATEX |= {unicodedata.lookup(f"GREEK SMALL LETTER {name}"): rf"\{name} " for name in _GREEK.split()}
_LATEX["\N{GREEK SMALL LETTER LAMDA}"] = r"\lambda "
_CHARACTERS = str.maketrans(
    _LATEX | {chr(c): unicodedata.normalize("NFKC", chr(c)) for c in range(0xFF01, 0xFF5F) if chr(c) not in _LATEX}
)
_SUPERSCRIPTS = {c: unicodedata.normalize("NFKC", c) for c in "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿⁱ"} | {"⁻": "-"}
_SUBSCRIPTS = {c: unicodedata.normalize("NFKC", c) for c in "₀₁₂₃₄₅₆₇₈₉"}
_FRACTIONS = {c: unicodedata.normalize("NFKC", c).split("\N{FRACTION SLASH}") for c in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅐⅛⅜⅝⅞⅑⅒"}

_MARKDOWN = re.compile(r"(\*\*|__|\*|`)([^*`]+)\1")
_LABEL = r"(?i:(?:the\s+)?(?:final\s+|correct\s+)?(?:answer|option|choice)(?:\s+is)?\s*:?\s*)"
_FUNCTIONS = "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|ln|log|exp|gcd|lcm|max|min"
_NO_LETTER = "(?![a-zA-Z])"
_NESTED = r"((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)"  # text with balanced braces, two levels deep
# \text{...}, \operatorname{...} and commands, matched first so that the words in them stay as they are.
_COMMAND = r"\\(?:text|operatorname|begin|end)\s*\{[^{}]*\}|\\[a-zA-Z]+"

_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"\\(?:displaystyle|textstyle|left|right|big|Big|bigl|bigr|Bigl|Bigr|limits|bf|rm|it)" + _NO_LETTER, ""),
        (r"\\(?:checkmark|blacksquare|qed)(?![a-zA-Z])|\\(?:[hv]space\*?|color)\s*\{[^{}]*\}", ""),
        (r"\\lbrace" + _NO_LETTER, r"\\{"),
        (r"\\rbrace" + _NO_LETTER, r"\\}"),
        (r"\\(?:[lr]?vert|mid)" + _NO_LETTER, "|"),
        (r"\\[lr]?Vert" + _NO_LETTER, r"\\|"),
        # {x : x > 1} becomes x > 1
        (r"^\\?\{\s*([a-z])\s*(?:\\in\s*\\mathbb\s*\{?R\}?)?\s*[|:]\s*((?=.*\1).*(?:[<>]|\\[lgn]e).*?)\\?\}$", r"\2"),
        (rf"^(?:\\(?:boxed|fbox|underline|mathit|mathsf)\s*)?\{{\s*{_NESTED}\}}$", r"\1"),
        (r"\\(?:mathbf|boldsymbol|bm)\s*\{((?=\d|[A-Z]+\})[^{}]*)\}", r"\1"),
        (r"\\[hv]?phantom(?![a-zA-Z])\s*(?:\{[^{}]*\}|\\[a-zA-Z]+|\S)", ""),  # \phantom{...} is blank space
        (r"\\[dtc]frac" + _NO_LETTER, r"\\frac"),
        (
            r"\\frac\s*(\\[a-zA-Z]+|[0-9a-zA-Z])\s*(\\[a-zA-Z]+|[0-9a-zA-Z])",
            r"\\frac{\1}{\2}",
        ),  # \frac12 is \frac{1}{2}
        (r"\\frac\s*(\{[^{}]*\})\s*([0-9a-zA-Z])", r"\\frac\1{\2}"),
        (r"\\frac\s*([0-9a-zA-Z])\s*\{", r"\\frac{\1}{"),
        (r"\\sqrt\s*(\[[^][]*\])?\s*(\\[a-zA-Z]+|[0-9a-zA-Z])", r"\\sqrt\1{\2}"),
        (r"\\[dt]?binom\s*([0-9a-zA-Z])\s*([0-9a-zA-Z])", r"\\binom{\1}{\2}"),
        (r"(?:^|\{)\s*([^{}]*?)\s*\\choose\s*([^{}]*?)\s*(?:$|\})", r"\\binom{\1}{\2}"),
        (r"(?<![a-zA-Z\\])sqrt\s*(\d+)" + _NO_LETTER, r"\\sqrt{\1}"),
        (r"\\lg" + _NO_LETTER, r"\\log_{10}"),
        (r"\\mathbb\s+([A-Z])|\\([NRZ])" + _NO_LETTER, r"\\mathbb{\1\2}"),
        (r"\\(?:textbf|textit|textrm|textnormal|mbox|mathrm)\s*\{", r"\\text{"),
        (r"(?<=\d)(?:\{,\}|,\\!)\s*(?=\d{3})", ""),  # thousands: 32{,}348 and 32,\!348
        (r"(?<=\d)\\,(?=\d{3}(?!\d))", ""),
        (r"(?<!\\)\\!", ""),
        (r"(?<!\\)\\[,;: ]|\\q?quad(?![a-zA-Z])|~", " "),
        (r"^(?:\\\$|\$\\\$)\s*(-?[\d.][\d., ]*)\$?$", r"\1\\text{ dollars}"),
        (r"^(-?)\\\$\s*([\d.][\d., ]*)$", r"\1\2\\text{ dollars}"),
        (r"^\$?\\(euro|pounds|yen)\s*([\d.][\d., ]*)\$?$", r"\2\\\1"),
        (r"\\euro" + _NO_LETTER, r"\\text{ euros}"),
        (r"\\pounds" + _NO_LETTER, r"\\text{ GBP}"),
        (r"\\yen" + _NO_LETTER, r"\\text{ yen}"),
        (r"(?<!\\)\\[()\[\]]|\\?\$", ""),  # mathematics delimiters and dollar signs
        (r"\s*\^\s*(?:\\circ|\{\s*\\circ\s*\})\s*([CF])\s*$", r"\\text{ degrees \1}"),
        (r"\s*\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree(?![a-zA-Z])", r"\\text{ degrees}"),
        # \text{5 apples} becomes 5\text{ apples}; "The answer is" in front is removed
        (r"^\\text\s*\{\s*(-?\d[\d.,/]*)(\s[^{}]*)?\}$", r"\1\\text{\2}"),
        (rf"^(\\text\s*\{{)?\s*{_LABEL}(?=[^a-z}}]|\}}.)", r"\1"),
        (r"\\text\s*\{[\s.,;:]*\}", ""),
        (r"^(\\text\s*\{\s*)?(?i:(?:the )?(?:empty|null) set|no solutions?)\s*(?(1)\})$", r"\\emptyset"),
        (r"^(\\text\s*\{\s*)?(?i:all (?:the )?real(?: number)?s)\s*(?(1)\})$", r"\\mathbb{R}"),
        (r"(?<![a-zA-Z\\])infinity" + _NO_LETTER, r"\\infty"),
        (r"(?<=[)\]])\s*U\s*(?=[(\[])", r"\\cup "),
        (r"(?<=\d)\s*(?:\\text\s*\{\s*to\s*\}|\bto\b)\s*(?=\d)", ":"),
        (r"\\frac\s*\{\s*\\text\s*\{([^{}]*)\}\s*\}\s*\{\s*\\text\s*\{([^{}]*)\}([^{}]*)\}", r"\\text{ \1/\2}\3"),
        (r"^(-?[0-9A-F]+)\s*(?:\\text\s*\{\s*)?\(?base\s*\}?\s*(\d+)\s*\)?\s*\}?$", r"\1_{\2}"),
        (r"\\text\s*\{\s*([A-Z](?:(?:\s*,\s*(?:and\s)?|\sand\s)\s*[A-Z])+)\s*\}", r"\1"),
        (r",?\s*\\text\s*\{\s*,?\s*and\s*\}", ", "),
        (r",?\s*(?:\\text\s*\{\s*,?\s*or\s*\}|\\(?:lor|vee)(?![a-zA-Z]))", r" \\lor "),
        (r"(?<![a-zA-Z\\])pi(?![a-zA-Z])", r"\\pi"),
        (r"\s*(?:\\?%|\\text\s*\{\s*percent\s*\}|(?<=[\d}) ])percent$)", r"\\%"),
        (r"^\s*(?:\\approx|=)", ""),
        (r"\*\*", "^"),
        (r"\\(le|ge)q?(?:slant)?" + _NO_LETTER, r"\\\1"),
        (r"<=", r"\\le "),
        (r">=", r"\\ge "),
        (r"\\neq" + _NO_LETTER + "|!=", r"\\ne "),
        (r"\\lt" + _NO_LETTER, "<"),
        (r"\\gt" + _NO_LETTER, ">"),
        (r"\\(?:varnothing|empty)(?![a-zA-Z])|\\\{\s*\\\}", r"\\emptyset"),
        (r"\\(?:backslash|smallsetminus)" + _NO_LETTER, r"\\setminus"),
        (r"\\(?:c|l|)dots[bcmio]?(?![a-zA-Z])|\.\.\.+", r"\\ldots"),
        (r"\\var(phi|epsilon|theta)" + _NO_LETTER, r"\\\1"),
        (r"\^\s*\{?\s*\\prime\s*\}?", "'"),
    ]
]
_WORDS = re.compile(
    rf"(?P<command>{_COMMAND})|,?\s*(?<![a-zA-Z])(?P<join>and|or)(?![a-zA-Z])\s*"
    rf"|(?<![a-zA-Z])(?P<function>{_FUNCTIONS})(?=x?(?![a-zA-Z]))"
)
_BRACKET = re.compile(r"((?<![a-zA-Z])\\?sqrt(?:\s*\[3\])?|(?<![a-zA-Z\\])abs|\^)?\s*\(|\)")
_BRACES = {
    r"\sqrt": (r"\sqrt{", "}"),
    "sqrt": (r"\sqrt{", "}"),
    r"\sqrt[3]": (r"\sqrt[3]{", "}"),
    "abs": ("|", "|"),
    "^": ("^{", "}"),
}
_BASED = re.compile(r"^(?:\\text\s*\{)?(-?[0-9A-F]+)\}?_\{?(\d+)\}?$")


def canonicalize(text: str) -> str:
    """Rewrite an answer in its canonical spelling; texts with the same one are equal in mathematics."""
    if not text.isascii():
        text = _unicode_to_latex(text).translate(_CHARACTERS)
    text = " ".join(text.split())  # before the patterns, which take quadratic time on long runs of spaces
    if emphasis := _MARKDOWN.fullmatch(text):
        text = emphasis[2]
    if text.isdigit():
        return text
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = _WORDS.sub(_replace_word, _brackets_to_braces(text))
    return " ".join(text.split()).rstrip(".;, ")


def split_base(text: str) -> tuple[str, str] | None:
    """Split a numeral with a base, such as 4343_6, into (digits, base); None for other texts."""
    match = _BASED.match(text)
    return (match[1], match[2]) if match else None


def _unicode_to_latex(text: str) -> str:
    """Write Unicode's superscripts, subscripts, fractions and roots in LaTeX: x² as x^{2}, ½ as \\frac{1}{2}."""
    text = re.sub(f"[{''.join(_SUPERSCRIPTS)}]+", lambda m: "^{" + "".join(_SUPERSCRIPTS[c] for c in m[0]) + "}", text)
    text = re.sub(f"[{''.join(_SUBSCRIPTS)}]+", lambda m: "_{" + "".join(_SUBSCRIPTS[c] for c in m[0]) + "}", text)
    text = re.sub(f"[{''.join(_FRACTIONS)}]", lambda m: r"\frac{" + "}{".join(_FRACTIONS[m[0]]) + "}", text)
    text = text.replace("\N{CUBE ROOT}", r"\sqrt[3]").replace("\N{SQUARE ROOT}", r"\sqrt")
    return re.sub(r"(?<=\\sqrt)(\[3\])?\s*(\d+)", r"\1{\2}", text)


def _brackets_to_braces(text: str) -> str:
    """Write sqrt(x+1), abs(x) and x^(1/2) in LaTeX, with braces or bars."""
    pieces, closers, end = [], [], 0
    for match in _BRACKET.finditer(text):
        pieces.append(text[end : match.start()])
        end = match.end()
        if match[0] != ")":
            opening, closing = _BRACES.get(match[1], ("", ""))
            closers.append((len(pieces), match[0], closing))
            pieces.append(opening or match[0])
        elif closers:
            pieces.append(closers.pop()[2] or ")")
        else:
            pieces.append(")")
    for index, original, _ in closers:  # never closed
        pieces[index] = original
    return "".join(pieces) + text[end:]


def _replace_word(match: re.Match[str]) -> str:
    if match["command"]:
        return match[0]
    if match["join"]:
        return ", " if match["join"] == "and" else r" \lor "
    return "\\" + match["function"] + " "
