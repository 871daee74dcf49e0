"""torch.compile for the element-wise parts of the layers on CUDA (not run); on a CPU they run as they are.

Compiled code rounds where plain code does, so that the policy computes what the model on disk does: fused activations
and rope with other rounding are known to disturb DeepSeek-R1-Distill-Qwen.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """`function`, compiled at its first call if CUDA is available."""

    @cache
    def choose() -> Callable[..., Any]:
        if not torch.cuda.is_available():
            return function
        return torch.compile(function, options={"emulate_precision_casts": True})

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return choose()(*args, **kwargs)

    return call  # type: ignore[return-value]
