"""Parses a canonical answer to a tree: splits it at commas, brackets and relations; the expressions between stay LaTeX.

String processing in time linear in the depth of brackets. The tree keeps order, brackets and ellipses.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import product

MAX_DEPTH = 20

_PAIRS = {"(": ")", "[": "]", r"\{": r"\}", r"\langle": r"\rangle"}
_TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|.", re.DOTALL)
_OPEN = {"(", "[", "{", r"\{", r"\langle", r"\begin", r"\lfloor", r"\lceil"}
_CLOSE = {")", "]", "}", r"\}", r"\rangle", r"\end", r"\rfloor", r"\rceil"}
ORDER = {"<": "<", r"\le": "<=", ">": ">", r"\ge": ">=", r"\ne": "!="}
_RELATIONS = {"=", ":=", r"\equiv", r"\approx", r"\in", *ORDER}
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_SIGN = re.compile(r"\\(pm|mp)(?![a-zA-Z])")


@dataclass(frozen=True)
class Leaf:
    """One expression or word, as LaTeX."""

    text: str


@dataclass(frozen=True)
class Items:
    """A list of items: a tuple or interval in brackets, a set in "\\{", a bare list in "", a ratio a:b:c in ":"."""

    items: tuple[Node, ...]
    opening: str = ""
    closing: str = ""

    @property
    def ordered(self) -> bool:
        return self.opening not in ("", r"\{")  # a bare list and a set have no order


@dataclass(frozen=True)
class Relation:
    """A chain of equations or inequalities, such as 1 < x \\le 2: one operator fewer than sides."""

    sides: tuple[Node, ...]
    operators: tuple[str, ...]


@dataclass(frozen=True)
class Combined:
    """Sets joined by \\cup, \\cap or \\setminus, or inequalities joined by \\lor or a comma."""

    operator: str
    parts: tuple[Node, ...]


Node = Leaf | Items | Relation | Combined


def parse_answer(text: str, depth: int = 0) -> Node:
    """Parse a canonical answer to a tree. Raises ValueError for an empty item or brackets deeper than MAX_DEPTH."""
    text = text.strip()
    if depth > MAX_DEPTH:
        raise ValueError("brackets are nested too deep")
    parts, operators = _split(text, {",", ";", r"\lor"})
    if operators and operators[-1] == r"\lor" and not parts[-1].strip():
        raise ValueError("nothing follows the last or")
    if len(parts) > 1 and any(ORDER.keys() & set(_split(part, _RELATIONS)[1]) for part in parts):
        operator = r"\lor" if r"\lor" in operators else ","
        return Combined(operator, tuple(parse_answer(part, depth + 1) for part in parts))
    if _THOUSANDS.fullmatch(text):  # 12,345; but 1, 234 and 12,345,x are lists
        parts = [text.replace(",", "")]
    items = [item for part in parts for item in _expand_signs(part)]
    if len(items) > 1:
        return Items(tuple(parse_answer(item, depth + 1) for item in items))
    return _parse_relation(text, depth)


def _parse_relation(text: str, depth: int) -> Node:
    sides, operators = _split(text, _RELATIONS)
    if operators:
        return Relation(tuple(parse_answer(side, depth + 1) for side in sides), tuple(operators))
    for operator in (r"\setminus", r"\cup", r"\cap"):
        parts, operators = _split(text, {operator})
        if operators:
            return Combined(operator, tuple(parse_answer(part, depth + 1) for part in parts))
    return _parse_brackets(text, depth)


def _parse_brackets(text: str, depth: int) -> Node:
    tokens = [token for token in _TOKEN.findall(text) if not token.isspace()]
    if len(tokens) > 2 and tokens[0] in _PAIRS and tokens[-1] in _PAIRS.values() and _is_one_group(tokens):
        opening, closing = tokens[0], tokens[-1]
        inner = text[len(opening) : len(text) - len(closing)].strip()
        parts, _ = _split(inner, {",", ";"})
        if opening == r"\{":
            content = parse_answer(inner, depth + 1)
            items = content.items if isinstance(content, Items) and not content.opening else (content,)
            return Items(items, opening, closing)
        if len(parts) > 1:
            return Items(tuple(parse_answer(part, depth + 1) for part in parts), opening, closing)
        if _PAIRS[opening] == closing:
            return parse_answer(inner, depth + 1)
    ratio, colons = _split(text, {":"})
    if len(colons) > 1:
        return Items(tuple(parse_answer(part, depth + 1) for part in ratio), ":", ":")
    if not text:
        raise ValueError("an item is empty")
    return Leaf(text)


def _split(text: str, separators: set[str]) -> tuple[list[str], list[str]]:
    """Split a text at the separators outside all brackets: (parts, separators), one part more than separators."""
    parts, operators, depth, start = [], [], 0, 0
    for token in _TOKEN.finditer(text):
        if token[0] in _OPEN:
            depth += 1
        elif token[0] in _CLOSE:
            depth -= 1
        elif depth == 0 and token[0] in separators:
            parts.append(text[start : token.start()])
            operators.append(token[0])
            start = token.end()
    return [*parts, text[start:]], operators


def _is_one_group(tokens: list[str]) -> bool:
    """True if the last token closes the first one's bracket; ( and ] are a pair, as in an interval."""
    depth = 0
    for index, token in enumerate(tokens):
        depth += (token in _OPEN) - (token in _CLOSE)
        if depth == 0:
            return index == len(tokens) - 1
    return False


def _expand_signs(text: str) -> list[str]:
    """Both values of 3 \\pm 2, all four of two \\pm, two where \\mp ties the signs; the text alone without signs."""
    signs = _SIGN.findall(text)
    if not signs or len(signs) > 4 or text.lstrip().startswith(r"\{"):
        return [text]
    if "mp" in signs:
        choices = [tuple(sign if name == "pm" else -sign for name in signs) for sign in (1, -1)]
    else:
        choices = list(product((1, -1), repeat=len(signs)))
    variants = []
    for choice in choices:
        pieces = _SIGN.split(text)[::2]  # the odd ones are the signs' names
        signed = "".join(piece + ("+" if sign > 0 else "-") for piece, sign in zip(pieces, choice, strict=False))
        variants.append((signed + pieces[-1]).strip().removeprefix("+"))
    return variants
