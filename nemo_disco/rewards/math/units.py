"""Splits units off the end of a canonical answer: known units are compared, counted things ignored, other words kept.

String processing. `5\\text{ cm}` is 5 with a unit, `5\\text{ apples}` is 5, `5\\text{ factorial}` is not 5.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from nemo_disco.rewards.math.canonical import canonicalize

_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}

Unit = tuple[tuple[str, int], ...]  # sorted (name, power) pairs; () for no unit, and for one that is not compared

# The spellings of each unit; a word that is missing here is looked up in lower case too.
_NAMES = {
    word: unit
    for unit, words in {
        "nm": "nm nanometer nanometers",
        "um": r"um \mum micrometer micrometers",
        "mm": "mm millimeter millimeters millimetre millimetres",
        "cm": "cm centimeter centimeters centimetre centimetres",
        "m": "m meter meters metre metres",
        "km": "km kilometer kilometers kilometre kilometres",
        "inch": "in inch inches",
        "foot": "ft foot feet",
        "yard": "yd yard yards",
        "mile": "mi mile miles",
        "light-year": "ly",
        "mg": "mg milligram milligrams",
        "g": "g gram grams",
        "kg": "kg kilogram kilograms",
        "ton": "ton tons tonne tonnes",
        "lb": "lb lbs pound pounds",
        "oz": "oz ounce ounces",
        "mL": "mL ml milliliter milliliters millilitre millilitres cc",
        "L": "L l liter liters litre litres",
        "gallon": "gal gallon gallons",
        "quart": "qt quart quarts",
        "pint": "pt pint pints",
        "cup": "cup cups",
        "acre": "acre acres",
        "hectare": "ha hectare hectares",
        "ms": "ms millisecond milliseconds",
        "s": "s sec secs second seconds",
        "min": "min mins minute minutes",
        "h": "h hr hrs hour hours",
        "day": "day days",
        "week": "week weeks",
        "month": "month months",
        "year": "yr yrs year years",
        "dollar": "dollar dollars usd USD",
        "cent": "cent cents",
        "euro": "euro euros eur EUR",
        "pound sterling": "gbp GBP",
        "yen": "yen",
        "rupee": "rupee rupees",
        "degree": "degree degrees deg",
        "celsius": "celsius C",
        "fahrenheit": "fahrenheit F",
        "kelvin": "kelvin kelvins K",
        "radian": "rad rads radian radians",
        "hertz": "Hz hz hertz",
        "kHz": "kHz",
        "N": "N newton newtons",
        "J": "J joule joules",
        "kJ": "kJ kilojoule kilojoules",
        "cal": "cal calorie calories",
        "kcal": "kcal kilocalorie kilocalories",
        "eV": "eV",
        "W": "W watt watts",
        "kW": "kW kilowatt kilowatts",
        "Pa": "Pa pascal pascals",
        "kPa": "kPa",
        "V": "V volt volts",
        "A": "A amp amps ampere amperes",
        "ohm": r"ohm ohms \Omega",
        "mol": "mol mole moles",
        "M": "M molar",
        "erg": "erg ergs",
        "pc": "pc parsec parsecs",
        "am": "am",
        "pm": "pm",
        "bit": "bit bits",
        "byte": "byte bytes",
    }.items()
    for word in words.split()
}
_COMPOUND = {"mph": "mile/h", "kmph": "km/h", "kph": "km/h", "kmh": "km/h", "fps": "foot/s"}
_ANY = {"unit", "units"}  # equal to any unit
_IRREGULAR = (
    "people men women children mice geese feet teeth fish sheep dice vertices indices matrices radii axes foci person "
    "man woman child student apple orange marble ball card coin book ticket way time point piece value digit number "
    "integer solution root pair team game student edge face triangle square cube tile block step trip box car dog cat"
)
_COUNT_NOUNS = set(_IRREGULAR.split())
# Words behind a number that change its value or meaning, though they may look like counted things.
_MEANING = re.compile(
    r"^(?:of|in|on|with)\b|\b(?:or|and|if|is|are|was|not|no|non|for|when|where|to|from|base|mod|modulo|even|odd|more|less|fewer|over|under|"
    r"above|below|about|than|at|most|least|times|plus|minus|choose|power|factorial\w*|gross(?:es)?|squares|cubes|squared|cubed|"
    r"tens|ones|halves|thirds|quarters|fourths|fifths|sixths|eighths|tenths|hundredths|thousandths|hundreds|"
    r"thousands|millions|billions|dozens?|pairs? of|factors of|multiples of|per ?cents?|remainders?|logs|roots of|"
    r"twice|half|thrice|double|triple|s|ss)\b|[^a-zA-Z.\s]"
)
_NOUN_PER = re.compile(r"^[a-z]+s per (?=[a-z]+$)")  # pages per day
_AFTER_NOUN = re.compile(
    r"(?<=[a-z])\s+(?:each|old|long|tall|high|wide|deep|away|apart|in total|total|in all|altogether|of [a-z]+)$"
)
_DEGREES = re.compile(r"\bdeg(?:ree)?s?\s+(?=C\b|F\b|[Cc]elsius|[Ff]ahrenheit)")
_TOKEN = re.compile(r"\\?[A-Za-z]+(?:\^\{?-?\d+\}?)?|/")
_LAST_TEXT = re.compile(
    r"(?P<over>/)?\s*(?:\\cdot\s*)?\\text\s*\{(?P<words>(?:[^{}]|\{[^{}]*\})*)\}\s*(?P<power>\^\s*(?:\d|\{\s*-?\d+\s*\}))?\s*$"
)
_LAST_WORDS = re.compile(r"(?<=[\d})])\s+(?P<words>[a-zA-Z]+(?:[a-zA-Z./ ]|\^\d|\^\{-?\d+\})*)$")
# Two letters without a space are more often a product: `2mg` is a weight in a formula, `4am` a multiple of am.
_SHORT_AND_SAFE = {"kg", "km", "cm", "mm", "ft", "hr", "Hz", "kJ", "kW"}
_GLUED_WORDS = re.compile(r"(?<=\d)(?P<words>[a-zA-Z]{2,}(?:\^[23]|/[a-zA-Z]+)?)$")
_ANGLE_ARGUMENT = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-zA-Z]).*\\text\{ degrees\}")
_INNER_DEGREES = re.compile(r"\\text\{ degrees\}(?=\s*\S)")


class Quantity(NamedTuple):
    """An answer in two parts: `body`, canonical LaTeX, and `unit`, () if there is none or none to compare."""

    body: str
    unit: Unit

    def differs_in_unit(self, other: Quantity) -> bool:
        """True if both have a unit and these differ; a missing unit matches any."""
        if not self.unit or not other.unit or self.unit == other.unit:
            return False
        names = {name for name, _ in self.unit + other.unit}
        return not ("degree" in names and names < {"degree", "celsius", "fahrenheit"})


def split_unit(text: str) -> Quantity:
    """Split a canonical answer into body and unit; a scale word such as million becomes a power of ten in the body."""
    if _ANGLE_ARGUMENT.search(text):
        return Quantity(text, ())
    body, words = text.rstrip(), ""
    while (match := _LAST_TEXT.search(body)) and match.start() > 0:  # m / s may come in pieces
        piece = " ".join(match["words"].split()).rstrip(".") + (match["power"] or "").replace(" ", "")
        words, body = f"{match['over'] or ' '}{piece} {words}".strip(), body[: match.start()].rstrip()
    bare = None if words else _LAST_WORDS.search(body) or _match_glued_unit(body)
    if bare:
        words, body = bare["words"], body[: bare.start()].rstrip()
    if not words:
        return Quantity(_clean(text), ())
    first, _, rest = words.lstrip(", ").partition(" ")
    if scale := _SCALES.get(first.lower()):
        unit = _find_unit(rest, bare=False) if rest else ()
        return Quantity(_clean(rf"{body} \times 10^{{{scale}}}"), unit or ())
    unit = _find_unit(words, bare=bare is not None)
    if unit is None or not body.rstrip(" ,"):
        return Quantity(_clean(text), ())
    return Quantity(_clean(body), unit)


def _match_glued_unit(body: str) -> re.Match[str] | None:
    """Match a unit or counted thing directly behind a number, unless it may be a product of letters: 5kg, 30km/h."""
    match = _GLUED_WORDS.search(body)
    word = re.split(r"[\^/]", match["words"])[0] if match else ""
    unit = word in _SHORT_AND_SAFE or (len(word) > 2 and (word in _NAMES or word in _COMPOUND or word in _COUNT_NOUNS))
    return match if unit else None


def strip_unit(text: str) -> str:
    """Rewrite an answer in canonical LaTeX without its unit, as algebra compares it."""
    return split_unit(canonicalize(text)).body


def _clean(body: str) -> str:
    return _INNER_DEGREES.sub(" ", body).rstrip(".;, ")


def _find_unit(words: str, bare: bool) -> Unit | None:
    """The unit that the words name, () for a counted thing, None for words that carry meaning."""
    words = _DEGREES.sub("", words.replace(".", "").strip(" ()"))
    counted = _AFTER_NOUN.sub("", _NOUN_PER.sub("per ", words))
    for spelled in (words, counted):
        if (powers := _parse_units(spelled, bare)) is not None:
            return tuple(sorted(powers.items()))
        if _MEANING.search(words) or not words:
            return None
    *_, noun = counted.split()
    plural = len(noun) > 3 and noun.endswith("s") and not noun.endswith(("ss", "us", "is"))
    return () if words.islower() and (plural or noun in _COUNT_NOUNS) else None


def _parse_units(words: str, bare: bool) -> dict[str, int] | None:
    """The power of each unit; None if a word is no unit. bare: outside \\text{}, where a letter may be a variable."""
    if bare and not (re.search(r"[a-zA-Z]{2}", words) or "/" in words):
        return None
    spelled = re.sub(r"\bper\b", " / ", words)
    tokens = _TOKEN.findall(spelled)
    if not tokens or re.sub(r"[\s]", "", "".join(tokens)) != re.sub(r"[\s]", "", spelled):
        return None
    powers: dict[str, int] = {}
    sign, next_power, last = 1, 1, ""
    is_any = False
    for token in tokens:
        word, _, exponent = token.partition("^")
        lower = word.lower()
        if token == "/":
            sign = -1
        elif lower in ("square", "sq", "cubic", "cu"):
            next_power = 2 if lower.startswith("s") else 3
        elif lower in ("squared", "cubed") and last:
            powers[last] *= 2 if lower == "squared" else 3
        elif lower in _ANY:
            is_any = True
        else:
            names = _COMPOUND.get(lower, _NAMES.get(word) or _NAMES.get(lower) or "")
            if not names:
                return None
            over, _, under = names.partition("/")
            power = sign * (int(exponent.strip("{}")) if exponent else next_power)
            powers[over] = powers.get(over, 0) + power
            if under:
                powers[under] = powers.get(under, 0) - power
            last, next_power = over, 1
    return {} if is_any else powers
