"""One spelling for answers that mean the same: LaTeX's spacing and sizes, dollar signs, units, number bases.

Rules here only re-spell, never evaluate; the answer and the gold answer both go through them. Pure string work.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_CHARACTERS = str.maketrans(
    {"\N{MINUS SIGN}": "-", "\N{EN DASH}": "-", "\N{MULTIPLICATION SIGN}": r"\times ", "\N{DIVISION SIGN}": r"\div "}
    | {"\N{MIDDLE DOT}": r"\cdot ", "\N{DEGREE SIGN}": r"^\circ", "\N{GREEK SMALL LETTER PI}": r"\pi "}
    | {"\N{INFINITY}": r"\infty ", "\N{LESS-THAN OR EQUAL TO}": r"\le ", "\N{GREATER-THAN OR EQUAL TO}": r"\ge "}
    | {"\N{UNION}": r"\cup ", "\N{ELEMENT OF}": r"\in ", "\N{ALMOST EQUAL TO}": r"\approx "}
)
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}

_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"\\(?:displaystyle|textstyle|left|right|big|Big|bigl|bigr|Bigl|Bigr)(?![a-zA-Z])", ""),
        (r"\\[hv]?phantom(?![a-zA-Z])\s*(?:\{[^{}]*\}|\\[a-zA-Z]+|\S)", ""),  # takes room, is not printed
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\frac\s*(\\[a-zA-Z]+|[0-9a-zA-Z])\s*(\\[a-zA-Z]+|[0-9a-zA-Z])", r"\\frac{\1}{\2}"),  # TeX: one token each
        (r"\\(?:textbf|textit|textrm|textnormal|mbox|mathrm)\s*\{", r"\\text{"),
        (r"(?<=\d)(?:\{,\}|,\\!)\s*(?=\d{3})", ""),  # 32{,}348 and 32,\!348 are thousands wherever they stand
        (r"(?<=\d)\\,(?=\d{3}(?!\d))", ""),
        (r"(?<!\\)\\!", ""),
        (r"(?<!\\)\\[,;: ]|\\q?quad(?![a-zA-Z])|~", " "),
        (r"(?<!\\)\\[()\[\]]|\\?\$", ""),  # mathematics delimiters and dollar signs
        (r"\s*\^\s*(?:\\circ|\{\s*\\circ\s*\})(?:\s*[CF]\s*$)?|\\degree(?![a-zA-Z])", r"\\text{ degrees}"),
        (r"\\text\s*\{\s*([A-Z](?:\s*,\s*[A-Z])+)\s*\}", r"\1"),
        (r",?\s*\\text\s*\{\s*,?\s*(?:and|or)\s*\}", ", "),
        (r"(?<![a-zA-Z\\])pi(?![a-zA-Z])", r"\\pi"),
        (r"\s*(?:\\?%|\\text\s*\{\s*percent\s*\}|(?<=[\d}) ])percent$)", r"\\%"),
        (r"^\s*\\approx", ""),
        (r"\\(le|ge)q?(?:slant)?(?![a-zA-Z])", r"\\\1"),
    ]
]
_TRAILING_TEXT = re.compile(r"^(.*\S)\s*\\text\s*\{([^{}]*)\}\s*(?:\^\s*(\d|\{-?\d+\}))?$")
_TRAILING_WORDS = re.compile(r"^(.*[\d})])\s*((?:\s[a-zA-Z][a-zA-Z.]+)+)(?:\^(\d|\{-?\d+\}))?$")
_INNER_DEGREES = re.compile(r"\\text\{ degrees\}(?=\s*\S)")
_BASED = re.compile(r"^(?:\\text\s*\{)?(-?[0-9A-F]+)\}?_\{?(\d+)\}?$")
_SCIENTIFIC = re.compile(r"([+-]?(?:\d+(?:\.\d*)?|\.\d+))[eE]([+-]?\d+)", re.ASCII)
_WHOLE = re.compile(r"([+-]?\d+)(?:\.(\d+))?\s*\\times\s*10\s*\^\s*\{?(\d{1,3})\}?", re.ASCII)
# math-verify's grammar takes \gamma for a function and \Omega for \omega; a subscript makes them letters of their own.
_GREEK = re.compile(
    r"\\(gamma|Delta|Lambda|Omega|Phi|Pi|Psi|Sigma|Theta|Upsilon|Xi)(?![a-zA-Z])(?:_\s*(?:\{(\w+)\}|(\w)))?"
)
_LETTERS = re.compile(r"\\(?:text|begin|end|operatorname)\s*\{[^{}]*\}|\\?[a-zA-Z]+")
_INDEX_I = re.compile(r"_\s*\{?\s*i(?![a-zA-Z])|(?<![a-zA-Z\\])i\s*=")

# Words that make a trailing \text{} more than a unit: without them the answer would mean something else.
_MEANING = re.compile(r"\b(?:or|and|if|is|are|not|no|non|for|when|where|to|from|base|mod|even|odd)\b|[^a-z.\s]")
_UNITS = {
    word: unit
    for unit, words in {
        "mm": "mm millimeter millimeters",
        "cm": "cm centimeter centimeters centimetre centimetres",
        "m": "m meter meters metre metres",
        "km": "km kilometer kilometers kilometre kilometres",
        "inch": "in inch inches",
        "foot": "ft foot feet",
        "yard": "yd yard yards",
        "mile": "mi mile miles",
        "gram": "g gram grams",
        "kg": "kg kilogram kilograms",
        "pound": "lb lbs pound pounds",
        "ounce": "oz ounce ounces",
        "second": "s sec second seconds",
        "minute": "min minute minutes",
        "hour": "h hr hrs hour hours",
        "day": "day days",
        "week": "week weeks",
        "month": "month months",
        "year": "yr yrs year years",
        "dollar": "dollar dollars usd",
        "cent": "cent cents",
        "degree": "degree degrees",
        "mile/hour": "mph",
        "km/hour": "kph kmph",
        "hertz": "hz",
        "am": "am",
        "pm": "pm",
        "": "square sq cubic cu unit units per",  # none of their own
    }.items()
    for word in words.split()
}


class Quantity(NamedTuple):
    """An answer without its unit: `body` is canonical LaTeX; `unit` a known unit, or "" for none or an unknown one.

    `power` is what the unit is raised to, or "" if that is not said in digits: square cm and cm^2 are the same.
    """

    body: str
    unit: str
    power: str

    def differs_in_unit(self, other: Quantity) -> bool:
        """Whether both name a unit, and not the same one; what is not said does not differ."""
        units, powers = {self.unit, other.unit} - {""}, {self.power, other.power} - {""}
        return len(units) > 1 or len(powers) > 1


def canonical(text: str) -> str:
    """The answer re-spelled; what is equal here is equal in mathematics."""
    text = " ".join(text.translate(_CHARACTERS).split())  # first: the patterns are linear in runs of one space
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return " ".join(text.split()).rstrip(".;, ")


def for_algebra(text: str) -> str:
    """What the symbolic grader gets: the canonical answer without its unit, spelled as math-verify's grammar needs it.

    Its percent sign crashes there, and its i would be a variable, real in `9i` but not in `9 i`.
    """
    body = quantity(canonical(text)).body.replace(r"\%", r"\times\frac{1}{100}")
    if scientific := _SCIENTIFIC.fullmatch(body):
        body = rf"{scientific[1]} \times 10^{{{scientific[2]}}}"  # 2e3 would be 2 times Euler's e times 3
    body = _GREEK.sub(_letter, _WHOLE.sub(_written_out, body) if _WHOLE.fullmatch(body) else body)
    return body if _INDEX_I.search(body) else _LETTERS.sub(_imaginary, body)


def _written_out(number: re.Match[str]) -> str:
    """8.7 times 10^8 as 870000000, which is exact, where it is a whole number."""
    digits, zeros = number[2] or "", int(number[3])
    return number[0] if len(digits) > zeros else number[1] + digits + "0" * (zeros - len(digits))


def _letter(greek: re.Match[str]) -> str:
    """A subscript of a capital letter (or gamma) is kept, behind a mark: \\Omega_0 is \\omega_{9x0}."""
    name = "varrho" if greek[1] == "gamma" else greek[1].lower()
    return rf"\{name}_{{9x{greek[2] or greek[3] or ''}}}"


def _imaginary(token: re.Match[str]) -> str:
    letters = token[0]
    return letters.replace("i", " I ") if len(letters) <= 2 else letters  # i, it; not a word, not a command


def squeezed(text: str) -> str:
    """Canonical text without the spaces and wrappers that only typesetting needs; for comparing, not for parsing."""
    bare = re.sub(r"\\text\s*\{\s*([^{}]*?)\s*\}", r" \1 ", text)
    bare = re.sub(r"^\s*\(\s*([A-Za-z])\s*\)\s*$", r"\1", bare)  # the choice (C)
    bare = re.sub(r"([_^])\s*\{\s*([0-9A-Za-z])\s*\}", r"\1\2", bare)
    return re.sub(r"(?<![0-9A-Za-z])\s+|\s+(?![0-9A-Za-z])", "", bare)


def quantity(text: str) -> Quantity:
    """Take the units off the end of a canonical answer; a scale word becomes a power of ten."""
    body, unit, power = text, "", ""
    while match := _TRAILING_TEXT.match(body) or _TRAILING_WORDS.match(body):
        words = match[2].lower().replace(".", "").split()
        is_text = match.re is _TRAILING_TEXT
        if scale := _SCALES.get(words[0]) if words else None:
            body = rf"{match[1]} \times 10^{{{scale}}}"
            break
        if _MEANING.search(match[2].lower()) or not (is_text or all(word in _UNITS for word in words)):
            break
        body = match[1]
        unit = "/".join(_UNITS[word] for word in words if _UNITS.get(word)) or unit
        power = (match[3] or power).strip("{}")
    return Quantity(_INNER_DEGREES.sub(" ", body).rstrip(".;, "), unit, power)


def based(text: str) -> tuple[str, str] | None:
    """(digits, base) of a numeral with its base, such as 4343_6; None if it is not one."""
    match = _BASED.match(text)
    return (match[1], match[2]) if match else None
