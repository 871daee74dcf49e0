"""Compares intervals, unions and inequalities as sets of real numbers. Runs in a killable process: it may never end."""

from __future__ import annotations

from typing import Any

import sympy  # type: ignore[import-untyped]

from nemo_disco.rewards.math.expressions import read_expression
from nemo_disco.rewards.math.structure import ORDER, Combined, Leaf, Node, Relation
from nemo_disco.rewards.math.words import is_word


def same_set(gold: Node, answer: Node) -> bool:
    """True if both describe the same set; inequalities must be in the same unknown, and in one alone."""
    gold_unknowns, unknowns = _unknowns(gold), _unknowns(answer)
    if (gold_unknowns and unknowns and gold_unknowns != unknowns) or max(len(gold_unknowns), len(unknowns)) > 1:
        return False
    if _is_word(gold) or _is_word(answer):
        return False
    try:
        a, b = to_set(gold), to_set(answer)
        return bool(a == b or a.symmetric_difference(b).is_empty)
    except (TypeError, ValueError, NotImplementedError, AttributeError):  # not a set, or sympy cannot compare it
        return False


def to_set(node: Node) -> Any:
    """The set of real numbers that the node describes. Raises ValueError where it describes none."""
    if isinstance(node, Leaf):
        value = read_expression(node.text)
        return value if isinstance(value, sympy.Set) else sympy.FiniteSet(value)  # \mathbb{R}, or a number
    if isinstance(node, Relation):
        return _solutions(node)
    if isinstance(node, Combined):
        sets = [to_set(part) for part in node.parts]
        if node.operator == r"\setminus":
            return sets[0] - sympy.Union(*sets[1:])
        if node.operator in (r"\cup", r"\lor"):
            return sympy.Union(*sets)
        intersection = sympy.Intersection(*sets)
        # A comma means "and"; it means "or" if both cannot hold: x < 1, x > 2
        return sympy.Union(*sets) if node.operator == "," and intersection.is_empty else intersection
    values = [_number(item) for item in node.items]
    if node.opening in ("", r"\{"):
        finite = sympy.FiniteSet(*values)
        if not node.opening and len(finite) < len(values):  # 5, 5 is not 5
            raise ValueError("a list with equal items is not a set")
        return finite
    if len(values) != 2 or node.opening not in "([" or node.closing not in ")]":
        raise ValueError("not an interval")
    interval = sympy.Interval(*values, left_open=node.opening == "(", right_open=node.closing == ")")
    if interval.is_empty:  # (2, 1) is a point
        raise ValueError("not an interval")
    return interval


def _is_word(node: Node) -> bool:
    return isinstance(node, Leaf) and is_word(node.text)


def _number(node: Node) -> Any:
    """A leaf's sympy expression. Raises ValueError for other nodes and for words."""
    value = read_expression(node.text) if isinstance(node, Leaf) and not is_word(node.text) else None
    if not isinstance(value, sympy.Expr):
        raise ValueError("not a number")
    return value


def _unknowns(node: Node) -> set[Any]:
    """The symbols of the inequalities in a node; symbols in an interval's ends do not count."""
    if isinstance(node, Combined):
        return set().union(*map(_unknowns, node.parts))
    if not isinstance(node, Relation):
        return set()
    texts = [side.text for side in node.sides if isinstance(side, Leaf) and not is_word(side.text)]
    return set().union(*(read_expression(text).free_symbols for text in texts))


def _solutions(chain: Relation) -> Any:
    """The set of reals that solve a chain of relations in one unknown. Raises ValueError for several unknowns."""
    if chain.operators[0] == r"\in":
        return to_set(chain.sides[1])
    symbols = _unknowns(chain)
    if len(symbols) != 1:
        raise ValueError("not one unknown")
    sides = [_number(side) for side in chain.sides]
    solutions: Any = sympy.S.Reals
    for left, sign, right in zip(sides, chain.operators, sides[1:], strict=False):
        relation = sympy.Rel(left, right, ORDER.get(sign, "=="))
        if relation == sympy.true:
            continue
        solutions &= sympy.S.EmptySet if relation == sympy.false else relation.as_set()
    return solutions
