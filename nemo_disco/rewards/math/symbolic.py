"""Decides whether an answer equals a gold answer in mathematics. Runs in a killable process only: it may never end.

The answers' trees (structure.py) are compared node by node, expressions by their values (values.py).
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from typing import Any

import sympy  # type: ignore[import-untyped]

from nemo_disco.rewards import verdict
from nemo_disco.rewards.math.expressions import count_significant_digits, read_expression
from nemo_disco.rewards.math.fast_path import required_digits
from nemo_disco.rewards.math.sets import same_set
from nemo_disco.rewards.math.structure import ORDER, Combined, Items, Leaf, Node, Relation, parse_answer
from nemo_disco.rewards.math.units import split_unit
from nemo_disco.rewards.math.values import same_value
from nemo_disco.rewards.math.words import is_word, same_text

_DECIMAL = re.compile(r"-?\s*(\d*\.?\d+)(?:\s*\\(?:times|cdot)\s*10\^.*)?")
_FLIPPED = {"<": ">", r"\le": r"\ge", ">": "<", r"\ge": r"\le"}


def judge(answer: str, golds: Sequence[str]) -> str:
    """The verdict's reason: CORRECT if the answer equals any of the gold ones (all canonical, without units).

    An error on one gold answer hides no other. Deterministic: sympy's random numbers are seeded, its cache is cleared.
    """
    sympy.core.random.seed(0)
    sympy.core.cache.clear_cache()
    reasons: list[str] = []
    for gold in golds:
        reasons.append(_compare(answer, gold))
        if reasons[-1] == verdict.CORRECT:
            break
    order = (verdict.CORRECT, verdict.NO_MEMORY, verdict.UNPARSABLE, verdict.WRONG, verdict.UNPARSABLE_GOLD)
    return min(reasons, key=order.index)


def _compare(answer: str, gold: str) -> str:
    """The verdict's reason for one gold answer."""
    reason_of_error: str = verdict.UNPARSABLE
    try:
        tree = _parse(answer)
        reason_of_error = verdict.UNPARSABLE_GOLD
        gold_tree = _parse(gold)
        reason_of_error = verdict.UNPARSABLE
        return verdict.CORRECT if equal(gold_tree, tree) else verdict.WRONG
    except MemoryError:
        return verdict.NO_MEMORY
    except Exception:  # latex2sympy raises Exception itself, and sympy anything on a hostile answer
        return reason_of_error


def equal(gold: Node, answer: Node) -> bool:
    """True if the two trees are equal in mathematics."""
    if isinstance(gold, Leaf) and isinstance(answer, Leaf):
        return _equal_leaves(gold, answer)
    if _is_inequality(gold) or _is_inequality(answer):
        return _same_inequality(gold, answer) or same_set(gold, answer)
    if isinstance(gold, Relation) or isinstance(answer, Relation):
        return _equal_equations(gold, answer)
    if isinstance(gold, Combined) and isinstance(answer, Combined) and gold.operator == answer.operator:
        if _matches(gold.parts, answer.parts, gold.operator == r"\setminus"):
            return True
    elif isinstance(gold, Items) and isinstance(answer, Items):
        return _equal_items(gold, answer) or _equal_singletons(gold, answer)
    return same_set(gold, answer) or _equal_singletons(gold, answer)


def _parse(text: str) -> Node:
    """The tree of an answer. Raises an Exception of any kind if it, or an expression in it, cannot be parsed."""
    node = parse_answer(text)
    for leaf in _leaves(node):
        _value(leaf)
    return node


def _leaves(node: Node) -> list[Leaf]:
    if isinstance(node, Leaf):
        return [node]
    parts = node.sides if isinstance(node, Relation) else node.items if isinstance(node, Items) else node.parts
    return [leaf for part in parts for leaf in _leaves(part)]


def _value(leaf: Leaf) -> Any | None:
    """The leaf as a sympy object; None for a word or an ellipsis. Raises as `read_expression`."""
    if is_word(leaf.text) or leaf.text == r"\ldots":
        return None
    body = split_unit(leaf.text).body
    return read_expression(body)


def _equal_leaves(gold: Leaf, answer: Leaf) -> bool:
    if same_text(answer.text, gold.text):
        return True
    a, b = split_unit(gold.text), split_unit(answer.text)
    gold_value, value = _value(gold), _value(answer)
    if gold_value is None or value is None or a.differs_in_unit(b):
        return False
    digits = required_digits(count_significant_digits(a.body), count_significant_digits(b.body))
    return same_value(gold_value, value, digits)


def _is_inequality(node: Node) -> bool:
    """True for an inequality, and for several that are joined."""
    if isinstance(node, Relation):
        return not ORDER.keys().isdisjoint(node.operators)
    return isinstance(node, Combined) and node.operator in (r"\lor", ",")


def _same_inequality(gold: Node, answer: Node) -> bool:
    """True for equal chains, from left or right; with two sides, also for an equal left side minus right side."""
    if isinstance(gold, Combined) and isinstance(answer, Combined) and gold.operator == answer.operator:
        return _matches(gold.parts, answer.parts)
    if not (isinstance(gold, Relation) and isinstance(answer, Relation)):
        return False
    for chain in (answer, _reverse(answer)):
        if chain.operators != gold.operators:
            continue
        if _matches(gold.sides, chain.sides, in_order=True):
            return True
        if len(gold.sides) == 2 and all(isinstance(side, Leaf) for side in (*gold.sides, *chain.sides)):
            values: list[Any] = [_value(side) for side in (*gold.sides, *chain.sides) if isinstance(side, Leaf)]
            if all(isinstance(value, sympy.Expr) for value in values):
                return same_value(values[0] - values[1], values[2] - values[3])
    return False


def _reverse(chain: Relation) -> Relation:
    """The chain read from the right: c > b > a as a < b < c."""
    return Relation(chain.sides[::-1], tuple(_FLIPPED.get(operator, operator) for operator in chain.operators[::-1]))


def _equal_equations(gold: Node, answer: Node) -> bool:
    """Compare equations, or an equation with a value: x = 2 + 3 = 5 equals 5."""
    if not isinstance(answer, Relation):
        assert isinstance(gold, Relation)
        return _has_value(gold, answer, only_names=True)
    if not isinstance(gold, Relation):
        return _has_value(answer, gold, only_names=False)
    gold_sides, sides = _distinct(gold.sides), _distinct(answer.sides)
    if _matches(gold_sides, sides):
        return True
    return len(gold_sides) == 2 == len(sides) and _same_equation(gold_sides, sides)


def _has_value(chain: Relation, value: Node, only_names: bool) -> bool:
    """True if a side of the chain equals the value, and each other side equals it too or is a label for it.

    only_names: a label must be a name such as x or f(x), since the chain is the gold answer: 2x + y = 0 is not 0.
    """
    equal_sides = [equal(side, value) if not only_names else equal(value, side) for side in chain.sides]
    if not any(equal_sides):
        return False
    if only_names and equal_sides[0] and not equal_sides[-1] and _is_name(value):  # V = abc is not V
        return False
    symbols = _symbols(value)
    for side, is_equal in zip(chain.sides, equal_sides, strict=True):
        is_label = _is_value_of_function(side, symbols) or (
            bool(_symbols(side)) and not (_symbols(side) & symbols) and (not only_names or _is_name(side))
        )
        if not (is_equal or is_label or (r"\approx" in chain.operators and _is_rounding(chain, equal_sides))):
            return False
    return True


def _is_rounding(chain: Relation, equal_sides: Sequence[bool]) -> bool:
    """True if all numbers of a chain with \\approx are roundings of one number.

    If its first number equals the value, the others must be within a twentieth of it. If a later one does, each must be
    the first one rounded to its own last digit, or round to the first: 97 \\approx 98 \\approx 99 is three guesses.
    """
    numbers = [(side, e) for side, e in zip(chain.sides, equal_sides, strict=True) if isinstance(side, Leaf)]
    numbers = [(side, e) for side, e in numbers if not _symbols(side)]
    try:
        values = [complex(_value(side)) for side, _ in numbers]  # type: ignore[arg-type]
    except TypeError:
        return False
    if not numbers:
        return False
    first, is_equal = numbers[0]
    if is_equal:
        return all(abs(value - values[0]) <= abs(values[0]) / 20 for value in values)
    steps = [_last_place(side.text, value) for (side, _), value in zip(numbers, values, strict=True)]
    first_step = steps[0] if "." in first.text else 0.0
    return all(
        value == values[0] or abs(value - values[0]) < max(step, first_step)
        for value, step in zip(values, steps, strict=True)
    )


def _last_place(text: str, value: complex) -> float:
    """The place value of a decimal's last digit, 0.01 for 3.14; 0 if the text is not a decimal."""
    match = _DECIMAL.fullmatch(split_unit(text).body)
    digits = int(match[1].replace(".", "")) if match else 0
    return abs(value) / digits if digits else 0.0


def _is_value_of_function(side: Node, symbols: set[str]) -> bool:
    """True if the side is the value of an unknown function, such as f(x), that is not among the symbols."""
    value = _value(side) if isinstance(side, Leaf) else None
    return isinstance(value, sympy.core.function.AppliedUndef) and str(value) not in symbols


def _is_name(node: Node) -> bool:
    """True if a side is a name only: x, f(x), AB, (x, y)."""
    if isinstance(node, Items):
        return all(map(_is_name, node.items))
    if not isinstance(node, Leaf):
        return False
    value = _value(node)
    if value is None or isinstance(value, sympy.Symbol | sympy.core.function.AppliedUndef):
        return True
    return isinstance(value, sympy.Expr) and value.is_Mul and all(factor.is_Symbol for factor in value.args)


def _symbols(node: Node) -> set[str]:
    """The names in a node: symbols, unknown functions' values and words."""
    names = set()
    for leaf in _leaves(node):
        value = _value(leaf)
        if value is None:
            names.add(leaf.text)
        else:
            names |= set(map(str, value.free_symbols | value.atoms(sympy.core.function.AppliedUndef)))
    return names


def _distinct(nodes: Sequence[Node]) -> list[Node]:
    """The nodes without those that equal an earlier one."""
    distinct: list[Node] = []
    for node in nodes:
        if not any(equal(earlier, node) for earlier in distinct):
            distinct.append(node)
    return distinct


def _same_equation(gold: Sequence[Node], answer: Sequence[Node]) -> bool:
    """True if left minus right side of one equation is a constant multiple, other than 0, of the other's."""
    sides: list[Any] = [_value(side) if isinstance(side, Leaf) else None for side in (*gold, *answer)]
    if not all(isinstance(side, sympy.Expr) for side in sides):
        return False
    gold_difference, difference = sides[0] - sides[1], sides[2] - sides[3]
    if not gold_difference.free_symbols or gold_difference.free_symbols != difference.free_symbols:
        return False
    ratio = sympy.simplify(difference / gold_difference)
    return bool(ratio != 0 and not ratio.free_symbols and ratio.is_finite)


def _equal_items(gold: Items, answer: Items) -> bool:
    """Compare lists: tuples and intervals in order, sets and bare lists in any order, unless an ellipsis, or labels on
    one side alone, fix it."""
    if gold.ordered and answer.ordered:
        brackets = (gold.opening, gold.closing) == (answer.opening, answer.closing)
        if not brackets and not (len(gold.items) > 2 and ":" not in (gold.opening, answer.opening)):
            return False
        return _matches(gold.items, answer.items, in_order=True)
    if gold.ordered or answer.ordered:
        bracketed, other = (gold, answer) if gold.ordered else (answer, gold)
        if other.opening or ":" in bracketed.opening:
            return False
        if len(gold.items) == 2 and (bracketed.opening, bracketed.closing) != ("(", ")"):  # an interval
            return False
        return _matches(_in_order_of_labels(gold.items), _in_order_of_labels(answer.items), in_order=True)
    gold_items, items = list(gold.items), list(answer.items)
    if gold.opening and answer.opening:
        gold_items, items = _distinct(gold_items), _distinct(items)
    has_ellipsis = Leaf(r"\ldots") in (*gold_items, *items)
    return _matches(gold_items, items, has_ellipsis or _has_labels(gold_items) != _has_labels(items))


def _has_labels(items: Sequence[Node]) -> bool:
    """True if each item has a label of its own, as in x = 1, y = 2; not for x_1 and x_2, roots of one equation."""
    labels = {item.sides[0] for item in items if isinstance(item, Relation)}
    are_roots = all(isinstance(label, Leaf) and re.fullmatch(r"x\s*_\s*\{?\s*\d\s*\}?", label.text) for label in labels)
    return len(labels) > 1 and len(labels) == len(items) and not are_roots


def _in_order_of_labels(items: tuple[Node, ...]) -> tuple[Node, ...]:
    """The items sorted by labels that are consecutive letters, y = 2, x = 1 as x = 1, y = 2; others as they are."""
    labels = {
        side.text: item for item in items if isinstance(item, Relation) and isinstance(side := item.sides[0], Leaf)
    }
    letters = sorted(labels)
    if not _has_labels(items) or "".join(letters) not in string.ascii_letters:
        return items
    return tuple(labels[letter] for letter in letters)


def _equal_singletons(gold: Node, answer: Node) -> bool:
    """Compare a list of one item with the item: {5} is 5, but {{1, 2}} is not {1, 2}."""
    a, b = _only_item(gold), _only_item(answer)
    return (a, b) != (gold, answer) and equal(a, b)


def _only_item(node: Node) -> Node:
    """The item of a list of one item that is not itself a set; other nodes as they are."""
    if not isinstance(node, Items) or len(node.items) != 1:
        return node
    item = node.items[0]
    is_set = (isinstance(item, Items) and item.opening in (r"\{", "[")) or item == Leaf(r"\emptyset")
    return node if is_set else item


def _matches(gold: Sequence[Node], answer: Sequence[Node], in_order: bool = False) -> bool:
    """True if the items can be paired so that both of each pair are equal; in_order: first with first, and so on."""
    if len(gold) != len(answer):
        return False
    if in_order:
        return all(equal(gold_item, item) for gold_item, item in zip(gold, answer, strict=True))
    unpaired = list(answer)
    for gold_item in gold:
        partner = next((item for item in unpaired if equal(gold_item, item)), None)
        if partner is None:
            return False
        unpaired.remove(partner)
    return True
