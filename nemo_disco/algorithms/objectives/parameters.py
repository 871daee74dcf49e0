"""Parameters of objectives: dataclass fields declared with their bounds, which are checked when an object is created.

`tau: float = parameter(10.0, above=0)` is the whole declaration: name, type, default, bounds. Imports no torch.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from dataclasses import Field, dataclass, field, fields
from difflib import SequenceMatcher
from typing import Any

from nemo_disco.runtime.errors import UserError


@dataclass(frozen=True)
class Bounds:
    """Allowed values of a parameter: one of `choices`, else a number within the bounds, finite unless `infinite` and
    without a fraction if `integer`."""

    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    infinite: bool = False
    integer: bool = False
    choices: tuple[Any, ...] = ()

    def violation(self, value: Any) -> str | None:
        """The rule that the value breaks, such as "must be above 0"; None if it is allowed."""
        if self.choices:
            choices = ", ".join(sort_by_similarity(str(value), map(str, self.choices)))
            allowed = any(type(value) is type(choice) and value == choice for choice in self.choices)
            return None if allowed else f"must be one of: {choices}"
        if isinstance(value, bool) or not isinstance(value, int | float):
            return "must be a number"
        if self.integer and not isinstance(value, int):
            return "must be an integer"
        largest = math.inf if self.infinite else sys.float_info.max
        if not abs(value) <= largest:  # nor is nan
            return "must be finite"
        if self.above is not None and value <= self.above:
            return f"must be above {self.above:g}"
        if self.at_least is not None and value < self.at_least:
            return f"must be at least {self.at_least:g}"
        if self.below is not None and value >= self.below:
            return f"must be below {self.below:g}"
        return None


def parameter(default: Any, **bounds: Any) -> Any:
    """A dataclass field with a default and the keyword arguments of `Bounds`; None is allowed if it is the default."""
    return field(default=default, metadata={"bounds": Bounds(**bounds)})


@dataclass(frozen=True, kw_only=True)
class ParameterSet:
    """A frozen dataclass that checks its fields made by `parameter`. Raises UserError naming the field."""

    def __post_init__(self) -> None:
        for f in fields(self):
            value, bounds = getattr(self, f.name), f.metadata.get("bounds")
            if bounds is None or (value is None and f.default is None):
                continue
            if violation := bounds.violation(value):
                raise UserError(f"{self.label()}{key_of(f)} {violation}; it is {value!r}")

    def label(self) -> str:
        """Prefix of a field's name in messages, such as "constraint."."""
        return ""


def key_of(f: Field[Any]) -> str:
    """The field's key in a configuration: its name, without the underscore that `lambda_` needs in Python."""
    return f.name.rstrip("_")


def sort_by_similarity(name: str, names: Iterable[str]) -> list[str]:
    """The names, sorted by similarity to `name`, most similar first."""
    return sorted(names, key=lambda other: -SequenceMatcher(None, name.lower(), other.lower()).ratio())
