"""Reasons why the grader and plain math-verify disagree about a case, guessed from how its answers are written.

Each rule has one reason; the first rule that fits counts. A disagreement that fits none is called unexplained, and a
person should look at it. The reasons are keys in benchmarks/results/grading.json.
"""

from __future__ import annotations

import re

UNEXPLAINED = "unexplained"
# (pattern, reason); a pattern is searched for in "answer ~ gold".
_RULES = [
    (r"\\%|%|percent", "percent: 80\\% is 0.8 and also 80; math-verify drops the sign on one side only"),
    (
        r"\\text\s*\{[^}]*\b(?:is|and|or|even|odd)\b|\\text\{[A-Z],",
        "words that carry the meaning: math-verify drops them",
    ),
    (r"million|billion|thousand", "a scale word: math-verify drops it"),
    (r"_\{?\d+\}?\s*~|_\{?\d+\}?$", "a numeral with its base: math-verify takes the base for an index or drops it"),
    (r"\\(?:text|mbox|mathrm|textbf)|\\circ|[\d }](?:cm|km|m|s|mph|inches|units?)\b", "units and words in text"),
    (r"\d(?:\\,|\\!|\{,\}|,\\!| )\d{3}(?!\d)", "thousands separators of LaTeX"),
    (r"\d,\d{3}(?!\d)", "thousands separators"),
    (r"\\infty|[<>]|\\[lg]e", "an interval and the inequality that says the same"),
    (r"(?<!\\)\bi\b|\d\s*i\b|\^i|I", "the imaginary unit: math-verify takes i for a variable"),
    (r"10\^|e[+-]?\d", "powers of ten: math-verify rounds to six places, whatever the size"),
    (r"\\frac\s*\\?[a-z0-9]+\s|\\frac\s*\d|\\sqrt\s*\d|pi", "LaTeX shorthand: \\frac12, \\sqrt2, pi"),
    (r"\d\s+\d+/\d|\d\s*\\d?frac", "mixed numbers"),
    (r"=", "equations: math-verify compares the right-hand sides, or what solves them"),
    (r"\\\$|\$", "dollar signs"),
    (r"matrix", "matrices"),
    (r"\\begin|\\\\", "other environments"),
    (r"\\pm|\\cup|\\cap|\\in|\{", "sets, signs and unions"),
    (r",", "lists: math-verify takes them for sets or tuples by its own rule"),
    (r"\.\d", "decimals: 0.333333 is 1/3 from six digits on"),
    (r":", "ratios"),
    (r"[A-Za-z]", "letters without mathematics"),
]


def explain_disagreement(answer: str, gold: str) -> str:
    """The reason of the first rule that fits the answer and the gold answer, or UNEXPLAINED."""
    text = f"{re.sub(r'^.*boxed{(.*)}.$', lambda m: m[1], answer, flags=re.DOTALL)} ~ {gold}"
    return next((reason for pattern, reason in _RULES if re.search(pattern, text)), UNEXPLAINED)
