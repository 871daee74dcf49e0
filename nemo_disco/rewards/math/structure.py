"""Splits a canonical answer at its commas, brackets and relations; what is between them stays LaTeX.

Pure string work, linear in the depth of brackets. Order, brackets and an ellipsis are content; nothing is evaluated.
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
_SIGN = re.compile(r"\\(pm|mp)(?![a-zA-Z])")


@dataclass(frozen=True)
class Leaf:
    """One expression or word, as LaTeX."""

    text: str


@dataclass(frozen=True)
class Items:
    """Items between commas. opening, closing: their brackets, "" for a bare list; "\\{" makes them a set."""

    items: tuple[Node, ...]
    opening: str = ""
    closing: str = ""

    @property
    def ordered(self) -> bool:
        return self.opening not in ("", r"\{")


@dataclass(frozen=True)
class Relation:
    """A chain such as 1 < x \\le 2: one operator fewer than sides."""

    sides: tuple[Node, ...]
    operators: tuple[str, ...]

    @property
    def is_equation(self) -> bool:
        return not ORDER.keys() & set(self.operators)


@dataclass(frozen=True)
class Combined:
    """Sets or statements joined by one operator: \\cup, \\cap, \\setminus or \\lor."""

    operator: str
    parts: tuple[Node, ...]


Node = Leaf | Items | Relation | Combined


def split_answer(text: str, depth: int = 0) -> Node:
    """The structure of a canonical answer. Raises ValueError where brackets are nested too deep or an item is empty."""
    text = text.strip()
    if depth > MAX_DEPTH:
        raise ValueError("nested too deep")
    parts, operators = _split(text, {",", ";", r"\lor"})
    if operators and operators[-1] == r"\lor" and not parts[-1].strip():
        raise ValueError("nothing after or")
    if len(parts) > 1 and any(ORDER.keys() & set(_split(part, _RELATIONS)[1]) for part in parts):
        joint = r"\lor" if r"\lor" in operators else ","
        return Combined(joint, tuple(split_answer(part, depth + 1) for part in parts))
    variants = [variant for part in _thousands(parts, text) for variant in _signs(part)]
    if len(variants) > 1:
        return Items(tuple(split_answer(variant, depth + 1) for variant in variants))
    return _relation(text, depth)


def _relation(text: str, depth: int) -> Node:
    sides, operators = _split(text, _RELATIONS)
    if operators:
        return Relation(tuple(split_answer(side, depth + 1) for side in sides), tuple(operators))
    for joint in (r"\setminus", r"\cup", r"\cap"):
        parts, operators = _split(text, {joint})
        if operators:
            return Combined(joint, tuple(split_answer(part, depth + 1) for part in parts))
    return _bracketed(text, depth)


def _bracketed(text: str, depth: int) -> Node:
    tokens = [token for token in _TOKEN.findall(text) if not token.isspace()]
    if len(tokens) > 2 and tokens[0] in _PAIRS and tokens[-1] in _PAIRS.values() and _is_one_group(tokens):
        opening, closing = tokens[0], tokens[-1]
        inner = text[len(opening) : len(text) - len(closing)].strip()
        parts, _ = _split(inner, {",", ";"})
        if opening == r"\{":
            found = split_answer(inner, depth + 1)
            items = found.items if isinstance(found, Items) and not found.opening else (found,)
            return Items(items, opening, closing)
        if len(parts) > 1:
            return Items(tuple(split_answer(part, depth + 1) for part in parts), opening, closing)
        if _PAIRS[opening] == closing:
            return split_answer(inner, depth + 1)
    ratio, colons = _split(text, {":"})
    if len(colons) > 1:
        return Items(tuple(split_answer(part, depth + 1) for part in ratio), ":", ":")
    if not text:
        raise ValueError("an item is empty")
    return Leaf(text)


def _split(text: str, separators: set[str]) -> tuple[list[str], list[str]]:
    """The parts of the text between separators outside all brackets, and those separators."""
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
    """Whether the first bracket is closed by the last token; ( and ] may belong together, as in an interval."""
    depth = 0
    for index, token in enumerate(tokens):
        depth += (token in _OPEN) - (token in _CLOSE)
        if depth == 0:
            return index == len(tokens) - 1
    return False


def _thousands(parts: list[str], text: str) -> list[str]:
    """12,345 alone is one number; 1, 234 is two, and so is every list with another item."""
    if re.fullmatch(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d+)?", text):
        return [text.replace(",", "")]
    return parts


def _signs(text: str) -> list[str]:
    """The two values of 3 \\pm 2 (four of two such signs, if \\mp does not tie them); the text itself without one."""
    signs = _SIGN.findall(text)
    if not signs or len(signs) > 4 or text.lstrip().startswith(r"\{"):
        return [text]
    if "mp" in signs:
        choices = [tuple(sign if name == "pm" else -sign for name in signs) for sign in (1, -1)]
    else:
        choices = list(product((1, -1), repeat=len(signs)))
    variants = []
    for choice in choices:
        pieces = _SIGN.split(text)[::2]  # without the signs' names
        signed = "".join(piece + ("+" if sign > 0 else "-") for piece, sign in zip(pieces, choice, strict=False))
        variants.append((signed + pieces[-1]).strip().removeprefix("+"))
    return variants
