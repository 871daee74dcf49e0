"""Parameters of objectives: declared beside their bounds, and checked when the objective is made.

`tau: float = parameter(10.0, above=0)` says all that there is to say. Imports no torch.
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
    """What a parameter may be: one of `choices`, or a number within the bounds, finite unless said otherwise."""

    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    infinite: bool = False
    choices: tuple[Any, ...] = ()

    def complaint(self, value: Any) -> str | None:
        """What is wrong with the value, or None."""
        if self.choices:
            known = ", ".join(nearest(str(value), map(str, self.choices)))
            allowed = any(type(value) is type(choice) and value == choice for choice in self.choices)
            return None if allowed else f"must be one of: {known}"
        if isinstance(value, bool) or not isinstance(value, int | float):
            return "must be a number"
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
    """A field of an objective, with its default and its bounds; a default of None may be given as None."""
    return field(default=default, metadata={"bounds": Bounds(**bounds)})


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A frozen value whose fields made by `parameter` are checked. Raises UserError naming the field."""

    def __post_init__(self) -> None:
        for f in fields(self):
            value, bounds = getattr(self, f.name), f.metadata.get("bounds")
            if bounds is None or (value is None and f.default is None):
                continue
            if complaint := bounds.complaint(value):
                raise UserError(f"{self.label()}{key_of(f)} {complaint}; it is {value!r}")

    def label(self) -> str:
        """What comes before a field's name in a message."""
        return ""


def key_of(f: Field[Any]) -> str:
    """The field's key in a configuration: `lambda` is a keyword of Python, so its field is `lambda_`."""
    return f.name.rstrip("_")


def nearest(given: str, known: Iterable[str]) -> list[str]:
    """The known names, those most like the given one first."""
    return sorted(known, key=lambda name: -SequenceMatcher(None, given.lower(), name.lower()).ratio())
