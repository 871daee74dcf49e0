"""How a rollouts file holds a value a token: as base64 of little-endian numbers, small in the file and in memory.

Pure; the training loop writes with it and the report reads.
"""

from __future__ import annotations

import base64
import binascii
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

LARGEST = 65504.0  # of float16


def pack_widths(widths: Sequence[int]) -> str:
    """How many characters of the response each token makes; 0 for one that only ends a character or the response."""
    return base64.b64encode(np.asarray(widths, "<u2").tobytes()).decode("ascii")


def pack_values(values: ArrayLike) -> str | float:
    """A value a token, in float16 (3 digits); the number alone where all tokens have the same."""
    numbers = np.asarray(values, np.float64)
    if len(numbers) and np.ptp(numbers) <= 1e-3 * np.abs(numbers).max():
        return float(f"{numbers.mean():.3g}")
    return base64.b64encode(numbers.clip(-LARGEST, LARGEST).astype("<f2").tobytes()).decode("ascii")


def unpack_widths(saved: Any) -> list[int] | None:
    """What `pack_widths` was given; None if this is nothing that it made."""
    numbers = _numbers(saved, "<u2")
    return None if numbers is None else [int(n) for n in numbers]


def unpack_values(saved: Any, count: int) -> NDArray[np.float64] | None:
    """[count] what `pack_values` was given, finite numbers; None if this is nothing that it made of so many."""
    if isinstance(saved, (int, float)):
        return np.full(count, float(saved)) if abs(saved) < sys.float_info.max else None  # an int may be beyond it
    numbers = _numbers(saved, "<f2")
    whole = numbers is not None and len(numbers) == count and np.isfinite(numbers).all()
    return numbers.astype(np.float64) if numbers is not None and whole else None


def _numbers(saved: Any, kind: str) -> NDArray[Any] | None:
    try:
        return np.frombuffer(base64.b64decode(saved, validate=True), kind)
    except (TypeError, ValueError, binascii.Error):
        return None
