"""How large a YAML text is once its aliases, or its interpolations, are written out: a few lines can fill any memory.

Reads texts, the files of config directories and a run's config.yaml; knows nothing of what they mean.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.saved_files import FileError, read_text

LONGEST = 1 << 18  # bytes of a config.yaml, of which a run's has 5,000
LARGEST = 100_000  # values; the largest config of this project has some 200
LONGEST_WRITTEN = 1_000_000  # characters of a value with all that it refers to
_REFERENCE = re.compile(r"\$\{(\.*)([^${}:]*)\}")  # to another value; calls of a resolver have a colon


def check_yaml(text: str, where: str) -> None:
    """Raises UserError for a text whose aliases stand for too much, or for themselves. Other faults are the reader's.

    where: the file, for the message.
    """
    if "*" not in text:
        return
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError):
        return
    if root is not None and _size(root, {}) > LARGEST:
        raise UserError(f"{where}: its YAML aliases stand for more than {LARGEST:,} values, or for themselves")


def check_yaml_files(roots: Iterable[Path]) -> None:
    """`check_yaml` for every file of the config directories that a composition may read."""
    for root in roots:
        for file in [*root.glob("*.yaml"), *root.glob("*/*.yaml")]:
            try:
                check_yaml(file.read_text(encoding="utf-8"), str(file))
            except (OSError, UnicodeDecodeError):
                continue  # not a config; the reader says so if it is asked for


def read_yaml(path: Path | str) -> Any:
    """A config.yaml as plain Python, as OmegaConf reads it, interpolations unresolved. Raises FileError."""
    from omegaconf import OmegaConf

    text = read_text(path, LONGEST)
    try:
        check_yaml(text, str(path))
        return OmegaConf.to_container(OmegaConf.create(text))
    except UserError:
        raise
    except Exception as error:  # YAML and OmegaConf raise every kind for odd texts
        raise FileError(path, f"not a usable YAML file: {' '.join(str(error).split())[:200]}") from None


def check_interpolations(container: dict[Any, Any]) -> None:
    """Raises UserError, naming the key, for a value that stands for too much once what it refers to is written out, or
    that refers to itself. container: a config before its interpolations are resolved."""
    known: dict[tuple[str, ...], float] = {}

    def size(key: tuple[str, ...], value: Any) -> float:
        if key not in known:
            known[key] = float("inf")  # until it is counted: reached again before that, it refers to itself
            if isinstance(value, dict | list):
                items = value.items() if isinstance(value, dict) else enumerate(value)
                known[key] = 1 + sum(size((*key, str(name)), item) for name, item in items)
            else:
                text = str(value)
                targets = [_target(key, *match.groups()) for match in _REFERENCE.finditer(text)]
                known[key] = len(text) + sum(size(to, _at(container, to)) for to in targets)
            if known[key] > LONGEST_WRITTEN:
                what = "itself" if known[key] == float("inf") else f"more than {LONGEST_WRITTEN:,} characters"
                raise UserError(f"{'.'.join(key)}: its interpolations refer to {what}")
        return known[key]

    for name, value in container.items():
        size((str(name),), value)


def _target(key: tuple[str, ...], dots: str, name: str) -> tuple[str, ...]:
    """The key that an interpolation in the value of `key` refers to: one dot is a neighbour, two one level above."""
    parts = tuple(part for part in name.replace("[", ".").replace("]", "").split(".") if part)
    return (key[: max(len(key) - len(dots), 0)] if dots else ()) + parts


def _at(container: Any, key: tuple[str, ...]) -> Any:
    """The value of a key, "" where there is none (whoever resolves the interpolations says so)."""
    for part in key:
        if isinstance(container, list) and part.isdecimal() and int(part) < len(container):
            container = container[int(part)]
        elif isinstance(container, dict):
            container = next((v for k, v in container.items() if str(k) == part), "")
        else:
            return ""
    return container


def _size(node: yaml.Node, known: dict[int, float]) -> float:
    """Values below a node, each alias written out; infinite for a node that contains itself."""
    if id(node) not in known:
        known[id(node)] = float("inf")  # until it is counted: reached again before that, it contains itself
        children: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            children = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        known[id(node)] = 1 + sum(_size(child, known) for child in children)
    return known[id(node)]
