"""LeetCode's linked lists and trees: the classes that its answers use undefined, and conversion from and to lists.

Runs inside a confined process (confined_process.py) and imports the standard library alone.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

_NODE = re.compile(r"\b(?:ListNode|TreeNode)\b")
_CONTAINER = re.compile(r"\b(?:list|List|Sequence|Iterable)\[")
MAX_NODES = 1_000_000  # of a list or tree that is read, which may be a cycle


class ListNode:
    def __init__(self, val: Any = 0, next: ListNode | None = None) -> None:
        self.val = val
        self.next = next


class TreeNode:
    def __init__(self, val: Any = 0, left: TreeNode | None = None, right: TreeNode | None = None) -> None:
        self.val = val
        self.left = left
        self.right = right


def decode_arguments(function: Callable[..., Any], arguments: list[Any], names: dict[str, Any]) -> list[Any]:
    """The arguments, with nodes in place of lists for parameters annotated as nodes.

    names: the program's names, since it may define the classes itself.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # a built-in function has none
        return arguments
    decoded = list(arguments)
    for i, (parameter, value) in enumerate(zip(parameters, arguments, strict=False)):
        annotation = str(parameter.annotation)
        if isinstance(value, list) and (kind := _NODE.search(annotation)):
            node = names[kind[0]]
            make = _build_list if kind[0] == "ListNode" else _build_tree
            decoded[i] = [make(item, node) for item in value] if _CONTAINER.search(annotation) else make(value, node)
    return decoded


def returns_node(function: Callable[..., Any]) -> bool:
    """True if the function is annotated to return a node; its None then stands for an empty list."""
    annotation = str(getattr(function, "__annotations__", {}).get("return"))
    return _NODE.search(annotation) is not None and _CONTAINER.search(annotation) is None


def as_list(value: Any) -> list[Any] | None:
    """The list that a node stands for, as tests write it; None for any other value."""
    if hasattr(value, "val") and hasattr(value, "next"):
        return list(_read_list(value))
    if hasattr(value, "val") and hasattr(value, "left") and hasattr(value, "right"):
        return _read_tree(value)
    return None


def _build_list(values: list[Any], node: type[Any]) -> Any:
    first = None
    for value in reversed(values):
        new = node(value)
        new.next = first
        first = new
    return first


def _build_tree(values: list[Any], node: type[Any]) -> Any:
    """Root of a tree, from its values level by level, each node's two children in turn; None for a missing child."""
    rest = iter(values)
    root = _build_tree_node(rest, node)
    parents = [] if root is None else [root]
    for parent in parents:
        for side in ("left", "right"):
            child = _build_tree_node(rest, node)
            setattr(parent, side, child)
            if child is not None:
                parents.append(child)
    return root


def _build_tree_node(values: Iterator[Any], node: type[Any]) -> Any:
    value = next(values, None)
    return None if value is None else node(value)


def _read_list(node: Any) -> Iterator[Any]:
    for _ in range(MAX_NODES):
        if node is None:
            return
        yield node.val
        node = node.next
    raise ValueError("a linked list has no end")


def _read_tree(root: Any) -> list[Any]:
    values: list[Any] = []
    nodes = [root]
    for node in nodes:
        values.append(None if node is None else node.val)
        if node is not None:
            nodes += [node.left, node.right]
        if len(nodes) > MAX_NODES:
            raise ValueError("a tree has no end")
    while values and values[-1] is None:
        values.pop()
    return values
