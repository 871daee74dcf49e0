"""Classes and functions from a user's own file: found by `module:name`, and named with file and line when they fail.

Imports no torch; knows neither objectives nor rewards.
"""

from __future__ import annotations

import importlib
import inspect
import math
import os
import sys
import traceback
from collections.abc import Callable
from numbers import Real
from types import CodeType
from typing import Any

from nemo_disco.runtime.errors import UserError


def load(key: str, name: str) -> Any:
    """What `module:attribute`, the value of a configuration's key, names; modules are also looked for in the working
    directory. Raises UserError."""
    module_name, _, attribute = name.partition(":")
    # An installed command, unlike `python -m`, does not search the directory that it is run in.
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit too
        raise UserError(f"{key}={name}: importing {module_name} raised {type(error).__name__}: {error}") from error
    if not hasattr(module, attribute):
        raise UserError(f"{key}={name}: {module.__file__} has no {attribute!r}")
    return getattr(module, attribute)


def is_users(cls: type) -> bool:
    """Whether a class comes from outside this package."""
    return cls.__module__.partition(".")[0] != __name__.partition(".")[0]


def defined_at(function: Callable[..., Any]) -> str:
    """file:line of a function's definition."""
    code = _code(function)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else repr(function)


def methods(cls: type) -> list[Callable[..., Any]]:
    """The methods that users wrote of a class."""
    return [f for owner in cls.__mro__ if is_users(owner) for f in vars(owner).values() if inspect.isfunction(f)]


def innermost(error: BaseException) -> str:
    """file:line of where an error was raised."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{frame.filename}:{frame.lineno}"


def raised_in(functions: list[Callable[..., Any]], error: BaseException) -> str:
    """The error, and file:line of the innermost of its frames in the file of one of the functions."""
    files = {code.co_filename for code in map(_code, functions) if code}
    frames = traceback.extract_tb(error.__traceback__)
    frame = next((f for f in reversed(frames) if f.filename in files), frames[-1])
    return f"{type(error).__name__} at {frame.filename}:{frame.lineno}: {' '.join(str(error).split())}"


def guarded(key: str, name: str, functions: list[Callable[..., Any]], call: Callable[[], Any]) -> Any:
    """What `call` returns. Raises UserError, with file and line in one of the user's functions, for what it raises."""
    try:
        return call()
    except KeyboardInterrupt:  # Ctrl-C while it ran
        raise
    except BaseException as error:  # SystemExit too: a user's function does not end the run
        raise UserError(f"{key}={name} raised {raised_in(functions, error)}") from error


def finite_number(key: str, name: str, place: str, returned: object) -> float:
    """It. place: of the code that returned it. Raises UserError if it is no finite number."""
    try:
        if isinstance(returned, Real) and math.isfinite(returned):
            return float(returned)
        shown = f"{returned!r:.80}"
    except OverflowError:
        shown = "a whole number that is too large for a float"
    raise UserError(f"{key}={name}: {place} must return a finite number; it returned {shown}")


def called(key: str, name: str, function: Callable[..., Any], *args: object) -> float:
    """What a user's function returns, a finite number. Raises UserError, with file and line, for anything else."""
    returned = guarded(key, name, [function], lambda: function(*args))
    return finite_number(key, name, defined_at(function), returned)


def _code(function: Callable[..., Any]) -> CodeType | None:
    """Of a function, a lambda or an object with __call__; None for what is not written in Python."""
    function = inspect.unwrap(function)
    code: CodeType | None = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    return code
