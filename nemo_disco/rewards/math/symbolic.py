"""Whether an answer equals a gold answer in mathematics. Runs inside a worker only: it may take for ever.

The answer's structure (structure.py) is compared item by item, its expressions by their values (values.py).
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from typing import Any

import sympy  # type: ignore[import-untyped]

from nemo_disco.rewards import verdict
from nemo_disco.rewards.math.expressions import read_expression, significant_digits
from nemo_disco.rewards.math.fast_path import sure_digits
from nemo_disco.rewards.math.sets import same_set
from nemo_disco.rewards.math.structure import Combined, Items, Leaf, Node, Relation, split_answer
from nemo_disco.rewards.math.units import quantity
from nemo_disco.rewards.math.values import same_value
from nemo_disco.rewards.math.words import is_word, same_text

_ROUNDED = re.compile(r"-?\s*(\d*\.?\d+)(?:\s*\\(?:times|cdot)\s*10\^.*)?")
_FLIPPED = {"<": ">", r"\le": r"\ge", ">": "<", r"\ge": r"\le"}


def judge(answer: str, golds: Sequence[str]) -> str:
    """The reason of the verdict: correct if the answer equals any of the golds (all canonical, without units).

    Depends on its arguments alone: sympy's random numbers are seeded and its cache is cleared each time.
    """
    sympy.core.random.seed(0)
    sympy.core.cache.clear_cache()
    ours = _read(answer)
    if ours is None:
        return verdict.UNPARSABLE
    parsed = [gold for gold in map(_read, golds) if gold is not None]
    if any(equal(gold, ours) for gold in parsed):
        return verdict.CORRECT
    return verdict.WRONG if parsed else verdict.UNPARSABLE_GOLD


def equal(gold: Node, answer: Node) -> bool:
    """Whether both say the same."""
    if isinstance(gold, Leaf) and isinstance(answer, Leaf):
        return _equal_leaves(gold, answer)
    if _is_statement(gold) or _is_statement(answer):
        return _same_inequality(gold, answer) or same_set(gold, answer)
    if isinstance(gold, Relation) or isinstance(answer, Relation):
        return _equal_equations(gold, answer)
    if isinstance(gold, Combined) and isinstance(answer, Combined) and gold.operator == answer.operator:
        if _matches(gold.parts, answer.parts, gold.operator == r"\setminus"):
            return True
    elif isinstance(gold, Items) and isinstance(answer, Items):
        return _equal_items(gold, answer) or _equal_singletons(gold, answer)
    return same_set(gold, answer) or _equal_singletons(gold, answer)


def _read(text: str) -> Node | None:
    """The structure of an answer all of whose expressions are understood; None if one is not."""
    try:
        node = split_answer(text)
        for leaf in _leaves(node):
            _value(leaf)
    except MemoryError:
        raise
    except Exception:  # latex2sympy raises Exception itself, and whatever its conversion meets
        return None
    return node


def _leaves(node: Node) -> list[Leaf]:
    if isinstance(node, Leaf):
        return [node]
    parts = node.sides if isinstance(node, Relation) else node.items if isinstance(node, Items) else node.parts
    return [leaf for part in parts for leaf in _leaves(part)]


def _value(leaf: Leaf) -> Any | None:
    """The sympy object that the LaTeX means; None for a word or an ellipsis, which is itself. Raises as its parser."""
    if is_word(leaf.text) or leaf.text == r"\ldots":
        return None
    body = quantity(leaf.text).body
    return read_expression(body)


def _equal_leaves(gold: Leaf, answer: Leaf) -> bool:
    if same_text(answer.text, gold.text):
        return True
    one, other = quantity(gold.text), quantity(answer.text)
    theirs, ours = _value(gold), _value(answer)
    if theirs is None or ours is None or one.differs_in_unit(other):
        return False
    digits = sure_digits(significant_digits(one.body), significant_digits(other.body))
    return same_value(theirs, ours, digits)


def _is_statement(node: Node) -> bool:
    """An inequality, or several."""
    if isinstance(node, Relation):
        return not node.is_equation
    return isinstance(node, Combined) and node.operator in (r"\lor", ",")


def _same_inequality(gold: Node, answer: Node) -> bool:
    """The same chain, from either end; of two sides, also with all on one side."""
    if isinstance(gold, Combined) and isinstance(answer, Combined) and gold.operator == answer.operator:
        return _matches(gold.parts, answer.parts)
    if not (isinstance(gold, Relation) and isinstance(answer, Relation)):
        return False
    for chain in (answer, _turned(answer)):
        if chain.operators != gold.operators:
            continue
        if _matches(gold.sides, chain.sides, in_order=True):
            return True
        if len(gold.sides) == 2 and all(isinstance(side, Leaf) for side in (*gold.sides, *chain.sides)):
            values: list[Any] = [_value(side) for side in (*gold.sides, *chain.sides) if isinstance(side, Leaf)]
            if all(isinstance(value, sympy.Expr) for value in values):
                return same_value(values[0] - values[1], values[2] - values[3])
    return False


def _turned(chain: Relation) -> Relation:
    """c > b > a as a < b < c."""
    return Relation(chain.sides[::-1], tuple(_FLIPPED.get(operator, operator) for operator in chain.operators[::-1]))


def _equal_equations(gold: Node, answer: Node) -> bool:
    """Chains of equal sides: each side must hold, or define what the others say, as `x` does in x = 2 + 3 = 5."""
    if not isinstance(answer, Relation):
        assert isinstance(gold, Relation)
        return _value_of_chain(gold, answer, only_names=True)
    if not isinstance(gold, Relation):
        return _value_of_chain(answer, gold, only_names=False)
    ours, theirs = _distinct(answer.sides), _distinct(gold.sides)
    if _matches(tuple(theirs), tuple(ours)):
        return True
    return len(ours) == 2 == len(theirs) and _same_equation(theirs, ours)


def _value_of_chain(chain: Relation, value: Node, only_names: bool) -> bool:
    """Whether a chain says the value: one side is it, and every other one is it too, or a label for it.

    only_names: the label must be a name such as x or f(x), since the chain is the gold answer: 2x + y = 0 is not 0.
    """
    right = [equal(side, value) if not only_names else equal(value, side) for side in chain.sides]
    if not any(right) or (only_names and right[0] and not right[-1] and _is_name(value)):  # V = abc is not V
        return False
    symbols = _symbols(value)
    for side, is_right in zip(chain.sides, right, strict=True):
        is_label = _is_function_of(side, symbols) or (
            bool(_symbols(side)) and not (_symbols(side) & symbols) and (not only_names or _is_name(side))
        )
        if not (is_right or is_label or (r"\approx" in chain.operators and _rounded(chain, right))):
            return False
    return True


def _rounded(chain: Relation, right: Sequence[bool]) -> bool:
    """Whether a chain with \\approx names one number, labels apart.

    Where its first number is the right one, the others are within a twentieth of it. Where a later one is, all are the
    first one rounded, or it is theirs, to their last digits: 97 \\approx 98 \\approx 99 is a guess at each of them.
    """
    numbers = [(side, r) for side, r in zip(chain.sides, right, strict=True) if isinstance(side, Leaf)]
    numbers = [(side, r) for side, r in numbers if not _symbols(side)]
    try:
        sizes = [complex(_value(side)) for side, _ in numbers]  # type: ignore[arg-type]
    except TypeError:
        return False
    first, is_right = numbers[0]
    if is_right:
        return all(abs(size - sizes[0]) <= abs(sizes[0]) / 20 for size in sizes)
    steps = [_last_place(side.text, size) for (side, _), size in zip(numbers, sizes, strict=True)]
    own = steps[0] if "." in first.text else 0.0
    return all(
        size == sizes[0] or abs(size - sizes[0]) < max(step, own) for size, step in zip(sizes, steps, strict=True)
    )


def _last_place(text: str, size: complex) -> float:
    """How much the last digit of a decimal counts; 0 where the text is none."""
    match = _ROUNDED.fullmatch(quantity(text).body)
    digits = int(match[1].replace(".", "")) if match else 0
    return abs(size) / digits if digits else 0.0


def _is_function_of(side: Node, symbols: set[str]) -> bool:
    """Whether a side is an unknown function's value, such as f(x), that the other side does not use."""
    value = _value(side) if isinstance(side, Leaf) else None
    return isinstance(value, sympy.core.function.AppliedUndef) and str(value) not in symbols


def _is_name(node: Node) -> bool:
    """Whether a side only names something: x, f(x), AB, (x, y)."""
    if isinstance(node, Items):
        return all(map(_is_name, node.items))
    if not isinstance(node, Leaf):
        return False
    value = _value(node)
    if value is None or isinstance(value, sympy.Symbol | sympy.core.function.AppliedUndef):
        return True
    return isinstance(value, sympy.Expr) and value.is_Mul and all(factor.is_Symbol for factor in value.args)


def _symbols(node: Node) -> set[str]:
    """The names in a node; a word is one, and so is an unknown function."""
    names = set()
    for leaf in _leaves(node):
        value = _value(leaf)
        if value is None:
            names.add(leaf.text)
        else:
            names |= set(map(str, value.free_symbols | value.atoms(sympy.core.function.AppliedUndef)))
    return names


def _distinct(sides: tuple[Node, ...]) -> list[Node]:
    kept: list[Node] = []
    for side in sides:
        if not any(equal(other, side) for other in kept):
            kept.append(side)
    return kept


def _same_equation(gold: Sequence[Node], answer: Sequence[Node]) -> bool:
    """Whether lhs - rhs of one is a multiple, other than 0, of the other's."""
    sides: list[Any] = [_value(side) if isinstance(side, Leaf) else None for side in (*gold, *answer)]
    if not all(isinstance(side, sympy.Expr) for side in sides):
        return False
    theirs, ours = sides[0] - sides[1], sides[2] - sides[3]
    if not theirs.free_symbols or theirs.free_symbols != ours.free_symbols:
        return False
    ratio = sympy.simplify(ours / theirs)
    return bool(ratio != 0 and not ratio.free_symbols and ratio.is_finite)


def _equal_items(gold: Items, answer: Items) -> bool:
    """In order between parentheses; in any order in a list or set, unless an ellipsis or labels fix what is meant."""
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
    ours, theirs = list(answer.items), list(gold.items)
    if gold.opening and answer.opening:
        ours, theirs = _distinct(answer.items), _distinct(gold.items)
    has_ellipsis = Leaf(r"\ldots") in (*ours, *theirs)
    return _matches(tuple(theirs), tuple(ours), has_ellipsis or _labelled(theirs) != _labelled(ours))


def _labelled(items: Sequence[Node]) -> bool:
    """Whether the items say which is which, as in x = 1, y = 2; x_1 and x_2 number the roots of one equation."""
    labels = {item.sides[0] for item in items if isinstance(item, Relation)}
    are_roots = all(isinstance(label, Leaf) and re.fullmatch(r"x\s*_\s*\{?\s*\d\s*\}?", label.text) for label in labels)
    return len(labels) > 1 and len(labels) == len(items) and not are_roots


def _in_order_of_labels(items: tuple[Node, ...]) -> tuple[Node, ...]:
    """y = 2, x = 1 as x = 1, y = 2: letters that follow each other in the alphabet have an order, others have none."""
    labels = {
        side.text: item for item in items if isinstance(item, Relation) and isinstance(side := item.sides[0], Leaf)
    }
    letters = sorted(labels)
    if not _labelled(items) or "".join(letters) not in string.ascii_letters:
        return items
    return tuple(labels[letter] for letter in letters)


def _equal_singletons(gold: Node, answer: Node) -> bool:
    """{5} is 5, but {{1, 2}} is not {1, 2}."""
    one, other = _only_item(gold), _only_item(answer)
    return (one, other) != (gold, answer) and equal(one, other)


def _only_item(node: Node) -> Node:
    if not isinstance(node, Items) or len(node.items) != 1:
        return node
    item = node.items[0]
    is_set = (isinstance(item, Items) and item.opening in (r"\{", "[")) or item == Leaf(r"\emptyset")
    return node if is_set else item


def _matches(gold: Sequence[Node], answer: Sequence[Node], in_order: bool = False) -> bool:
    """Whether each item has a partner of its own on the other side."""
    if len(gold) != len(answer):
        return False
    if in_order:
        return all(equal(one, other) for one, other in zip(gold, answer, strict=True))
    left = list(answer)
    for one in gold:
        partner = next((other for other in left if equal(one, other)), None)
        if partner is None:
            return False
        left.remove(partner)
    return True
