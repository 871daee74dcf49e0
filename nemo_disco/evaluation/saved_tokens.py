"""Encoding of one value for each token in rollout files: base64 of little-endian numbers, small on disk and in memory.

Pure; the training loop packs and the report unpacks.
"""

from __future__ import annotations

import base64
import binascii
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

FLOAT16_MAX = 65504.0


def pack_widths(widths: Sequence[int]) -> str:
    """Encode the number of characters that each token adds to the response; 0 for a token that adds none."""
    return base64.b64encode(np.asarray(widths, "<u2").tobytes()).decode("ascii")


def pack_values(values: ArrayLike) -> str | float:
    """Encode one value for each token as float16 (3 digits); as a single number if all are equal to 3 digits."""
    numbers = np.asarray(values, np.float64)
    if len(numbers) and np.ptp(numbers) <= 1e-3 * np.abs(numbers).max():
        return float(f"{numbers.mean():.3g}")
    return base64.b64encode(numbers.clip(-FLOAT16_MAX, FLOAT16_MAX).astype("<f2").tobytes()).decode("ascii")


def unpack_widths(saved: Any) -> list[int] | None:
    """Inverse of `pack_widths`; None if `saved` does not come from it."""
    numbers = _numbers(saved, "<u2")
    return None if numbers is None else [int(n) for n in numbers]


def unpack_values(saved: Any, count: int) -> NDArray[np.float64] | None:
    """[count] inverse of `pack_values`; None if `saved` does not hold so many finite numbers."""
    if isinstance(saved, (int, float)):
        return np.full(count, float(saved)) if abs(saved) < sys.float_info.max else None  # an int may be larger
    numbers = _numbers(saved, "<f2")
    valid = numbers is not None and len(numbers) == count and np.isfinite(numbers).all()
    return numbers.astype(np.float64) if numbers is not None and valid else None


def _numbers(saved: Any, dtype: str) -> NDArray[Any] | None:
    try:
        return np.frombuffer(base64.b64decode(saved, validate=True), dtype)
    except (TypeError, ValueError, binascii.Error):
        return None
