"""Safe reading of YAML: refuses a text whose aliases or interpolations expand to more than memory can hold.

Reads the files of config directories and a run's config.yaml; knows nothing of the meaning of keys.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.saved_files import FileError, read_text

MAX_BYTES = 1 << 18  # of a config.yaml; a run's has 5,000
MAX_VALUES = 100_000  # with aliases expanded; the largest config of this project has some 200
MAX_CHARACTERS = 1_000_000  # of a value with its interpolations expanded
_REFERENCE = re.compile(r"\$\{(\.*)([^${}:]*)\}")  # to another value; calls of a resolver have a colon


def check_yaml(text: str, where: str) -> None:
    """Raise UserError if aliases expand to more than MAX_VALUES values or contain themselves; invalid YAML passes.

    where: the file, for the message.
    """
    if "*" not in text:
        return
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError):
        return
    if root is not None and _size(root, {}) > MAX_VALUES:
        raise UserError(f"{where}: its YAML aliases expand to more than {MAX_VALUES:,} values, or contain themselves")


def check_yaml_files(roots: Iterable[Path]) -> None:
    """Apply `check_yaml` to every file of the config directories that a composition may read."""
    for root in roots:
        for file in [*root.glob("*.yaml"), *root.glob("*/*.yaml")]:
            try:
                check_yaml(file.read_text(encoding="utf-8"), str(file))
            except (OSError, UnicodeDecodeError):
                continue  # not a config; Hydra reports it if it is to be composed


def read_yaml(path: Path | str) -> Any:
    """Content of a YAML file as plain Python, parsed by OmegaConf, interpolations unresolved. Raises FileError."""
    from omegaconf import OmegaConf

    text = read_text(path, MAX_BYTES)
    try:
        check_yaml(text, str(path))
        return OmegaConf.to_container(OmegaConf.create(text))
    except UserError:
        raise
    except Exception as error:  # PyYAML and OmegaConf raise many types for malformed texts
        raise FileError(path, f"not a usable YAML file: {' '.join(str(error).split())[:200]}") from None


def check_interpolations(container: dict[Any, Any]) -> None:
    """Raise UserError, naming the key, if a value refers to itself or expands to more than MAX_CHARACTERS characters.

    container: a config before its interpolations are resolved.
    """
    sizes: dict[tuple[str, ...], float] = {}

    def size(key: tuple[str, ...], value: Any) -> float:
        if key not in sizes:
            sizes[key] = float("inf")  # until it is counted; if reached again before, it refers to itself
            if isinstance(value, dict | list):
                items = value.items() if isinstance(value, dict) else enumerate(value)
                sizes[key] = 1 + sum(size((*key, str(name)), item) for name, item in items)
            else:
                text = str(value)
                targets = [_target(key, *match.groups()) for match in _REFERENCE.finditer(text)]
                sizes[key] = len(text) + sum(size(to, _value_at(container, to)) for to in targets)
            if sizes[key] > MAX_CHARACTERS:
                target = "itself" if sizes[key] == float("inf") else f"more than {MAX_CHARACTERS:,} characters"
                raise UserError(f"{'.'.join(key)}: its interpolations refer to {target}")
        return sizes[key]

    for name, value in container.items():
        size((str(name),), value)


def _target(key: tuple[str, ...], dots: str, name: str) -> tuple[str, ...]:
    """The key that an interpolation in the value of `key` refers to; one leading dot is its section, two the parent."""
    parts = tuple(part for part in name.replace("[", ".").replace("]", "").split(".") if part)
    return (key[: max(len(key) - len(dots), 0)] if dots else ()) + parts


def _value_at(container: Any, key: tuple[str, ...]) -> Any:
    """Value of a key; "" if there is none, an error that is reported when the interpolations are resolved."""
    for part in key:
        if isinstance(container, list) and part.isdecimal() and int(part) < len(container):
            container = container[int(part)]
        elif isinstance(container, dict):
            container = next((v for k, v in container.items() if str(k) == part), "")
        else:
            return ""
    return container


def _size(node: yaml.Node, sizes: dict[int, float]) -> float:
    """Number of values below a node with aliases expanded; infinite for a node that contains itself."""
    if id(node) not in sizes:
        sizes[id(node)] = float("inf")  # until it is counted; if reached again before, it contains itself
        children: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            children = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        sizes[id(node)] = 1 + sum(_size(child, sizes) for child in children)
    return sizes[id(node)]
