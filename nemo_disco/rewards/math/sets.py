"""Intervals, unions and inequalities as sets of real numbers. Runs inside a worker only: it may take for ever."""

from __future__ import annotations

from typing import Any

import sympy  # type: ignore[import-untyped]

from nemo_disco.rewards.math.expressions import read_expression
from nemo_disco.rewards.math.structure import ORDER, Combined, Leaf, Node, Relation
from nemo_disco.rewards.math.words import is_word


def same_set(gold: Node, answer: Node) -> bool:
    """Whether both mean the same set, and, where both are inequalities, in the same unknown."""
    theirs, ours = _unknowns(gold), _unknowns(answer)
    if (theirs and ours and theirs != ours) or max(len(theirs), len(ours)) > 1:
        return False
    if not (_is_set(gold) and _is_set(answer)):
        return False
    try:
        one, other = as_set(gold), as_set(answer)
        return bool(one == other or one.symmetric_difference(other).is_empty)
    except (TypeError, ValueError, NotImplementedError, AttributeError):  # no such set, or none that sympy can compare
        return False


def as_set(node: Node) -> Any:
    """The set of real numbers that the node describes. Raises ValueError where it describes none."""
    if isinstance(node, Leaf):
        return _literal(node)
    if isinstance(node, Relation):
        return _solutions(node)
    if isinstance(node, Combined):
        sets = [as_set(part) for part in node.parts]
        if node.operator == r"\setminus":
            return sets[0] - sympy.Union(*sets[1:])
        if node.operator in (r"\cup", r"\lor"):
            return sympy.Union(*sets)
        joint = sympy.Intersection(*sets)
        # x < 1, x > 2: all at once is nothing, so that either is meant
        return sympy.Union(*sets) if node.operator == "," and joint.is_empty else joint
    values = [_number(item) for item in node.items]
    if node.opening in ("", r"\{"):
        finite = sympy.FiniteSet(*values)
        if not node.opening and len(finite) < len(values):  # 5, 5 is not 5
            raise ValueError("a list that says one thing twice")
        return finite
    if len(values) != 2 or node.opening not in "([" or node.closing not in ")]":
        raise ValueError("no interval")
    interval = sympy.Interval(*values, left_open=node.opening == "(", right_open=node.closing == ")")
    if interval.is_empty:  # (2, 1) is a point
        raise ValueError("no interval")
    return interval


def _is_set(node: Node) -> bool:
    return not (isinstance(node, Leaf) and is_word(node.text))


def _literal(leaf: Leaf) -> Any:
    value = read_expression(leaf.text)
    return value if isinstance(value, sympy.Set) else sympy.FiniteSet(value)


def _number(node: Node) -> Any:
    value = read_expression(node.text) if isinstance(node, Leaf) and not is_word(node.text) else None
    if not isinstance(value, sympy.Expr):
        raise ValueError("no number")
    return value


def _unknowns(node: Node) -> set[Any]:
    """The symbols of the inequalities in a node; an interval's ends are none."""
    if isinstance(node, Combined):
        return set().union(*map(_unknowns, node.parts))
    if not isinstance(node, Relation):
        return set()
    return set().union(*(_free_symbols(side) for side in node.sides))


def _free_symbols(node: Node) -> set[Any]:
    if isinstance(node, Leaf) and not is_word(node.text):
        return set(read_expression(node.text).free_symbols)
    return set()


def _solutions(chain: Relation) -> Any:
    """The reals that solve a chain of relations in one unknown."""
    if chain.operators[0] == r"\in":
        return as_set(chain.sides[1])
    symbols = _unknowns(chain)
    if len(symbols) != 1:
        raise ValueError("not one unknown")
    sides = [_number(side) for side in chain.sides]
    found: Any = sympy.S.Reals
    for left, sign, right in zip(sides, chain.operators, sides[1:], strict=False):
        relation = sympy.Rel(left, right, ORDER.get(sign, "=="))
        if relation == sympy.true:
            continue
        found = found & (sympy.S.EmptySet if relation == sympy.false else relation.as_set())
    return found
