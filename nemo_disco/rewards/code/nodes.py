"""LeetCode's linked lists and binary trees: the classes that its answers take as given, and their lists in tests.

Runs inside the confined process of sandbox_server.py and imports the standard library alone.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

_NODE = re.compile(r"\b(?:ListNode|TreeNode)\b")
_SEVERAL = re.compile(r"\b(?:list|List|Sequence|Iterable)\[")
LONGEST = 1_000_000  # nodes of a list that is read: it may have no end


class ListNode:
    def __init__(self, val: Any = 0, next: ListNode | None = None) -> None:
        self.val = val
        self.next = next


class TreeNode:
    def __init__(self, val: Any = 0, left: TreeNode | None = None, right: TreeNode | None = None) -> None:
        self.val = val
        self.left = left
        self.right = right


def arguments(function: Callable[..., Any], given: list[Any], names: dict[str, Any]) -> list[Any]:
    """The arguments, with nodes for the lists of parameters that are annotated as such.

    names: the program's, which may define the classes itself.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # a built-in function has none
        return given
    made = list(given)
    for i, (parameter, value) in enumerate(zip(parameters, given, strict=False)):
        annotation = str(parameter.annotation)
        if isinstance(value, list) and (kind := _NODE.search(annotation)):
            node = names[kind[0]]
            make = _linked if kind[0] == "ListNode" else _tree
            made[i] = [make(item, node) for item in value] if _SEVERAL.search(annotation) else make(value, node)
    return made


def returned_by(function: Callable[..., Any]) -> bool:
    """Whether the function is annotated to return a node, of which None is an empty list."""
    annotation = str(getattr(function, "__annotations__", {}).get("return"))
    return _NODE.search(annotation) is not None and _SEVERAL.search(annotation) is None


def as_list(value: Any) -> list[Any] | None:
    """A node's list, as tests write it; None for what is no node."""
    if hasattr(value, "val") and hasattr(value, "next"):
        return list(_values(value))
    if hasattr(value, "val") and hasattr(value, "left") and hasattr(value, "right"):
        return _levels(value)
    return None


def _linked(values: list[Any], node: type[Any]) -> Any:
    first = None
    for value in reversed(values):
        made = node(value)
        made.next = first
        first = made
    return first


def _tree(values: list[Any], node: type[Any]) -> Any:
    """By levels from the top, each node's two children in turn; None where there is none."""
    rest = iter(values)
    root = _tree_node(rest, node)
    parents = [] if root is None else [root]
    for parent in parents:
        for side in ("left", "right"):
            child = _tree_node(rest, node)
            setattr(parent, side, child)
            if child is not None:
                parents.append(child)
    return root


def _tree_node(values: Iterator[Any], node: type[Any]) -> Any:
    value = next(values, None)
    return None if value is None else node(value)


def _values(node: Any) -> Iterator[Any]:
    for _ in range(LONGEST):
        if node is None:
            return
        yield node.val
        node = node.next
    raise ValueError("a linked list has no end")


def _levels(root: Any) -> list[Any]:
    found: list[Any] = []
    nodes = [root]
    for node in nodes:
        found.append(None if node is None else node.val)
        if node is not None:
            nodes += [node.left, node.right]
        if len(nodes) > LONGEST:
            raise ValueError("a tree has no end")
    while found and found[-1] is None:
        found.pop()
    return found
