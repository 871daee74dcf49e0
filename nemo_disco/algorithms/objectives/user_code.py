"""Objectives from a user's own file: found by `module:Class`, and named with file and line when they fail.

Imports no torch; must not catch what our own objectives raise.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable
from typing import Any

from nemo_disco.runtime import user_code


def load(name: str) -> Any:
    """What `module:attribute` names; modules are also looked for in the working directory. Raises UserError."""
    return user_code.load("algorithm.name", name)


def is_users(cls: type) -> bool:
    """Whether a class comes from outside this package."""
    return cls.__module__.partition(".")[0] != __name__.partition(".")[0]


def defined_at(function: Callable[..., Any]) -> str:
    """file:line of a function's definition."""
    code = inspect.unwrap(function).__code__
    return f"{code.co_filename}:{code.co_firstlineno}"


def raised_in(cls: type, error: Exception) -> str:
    """The error, and file:line of the innermost of its frames in the file of one of the class's own methods."""
    methods = [method for owner in cls.__mro__ if is_users(owner) for method in vars(owner).values()]
    files = {method.__code__.co_filename for method in methods if inspect.isfunction(method)}
    frames = traceback.extract_tb(error.__traceback__)
    frame = next((f for f in reversed(frames) if f.filename in files), frames[-1])
    return f"{type(error).__name__} at {frame.filename}:{frame.lineno}: {error}"
