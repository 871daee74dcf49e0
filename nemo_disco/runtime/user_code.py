"""Imports and calls a user's own classes and functions, named by `module:attribute`; errors name their file and line.

Imports no torch and nothing of objectives or rewards.
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

from nemo_disco.runtime.errors import UserError, one_line


def load_object(key: str, name: str) -> Any:
    """Import and return the object that a configuration's `key` names as `module:attribute`, also from the working
    directory. Raises UserError if there is none."""
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


def module_file(name: str) -> str:
    """Path of the file that holds `module:attribute`, found without importing it; "" if there is none."""
    path, parts, spec = [*filter(None, sys.path), os.getcwd()], name.partition(":")[0].split("."), None
    for end in range(1, len(parts) + 1):
        specs = (finder.find_spec(".".join(parts[:end]), path) for finder in sys.meta_path)
        spec = next(filter(None, specs), None)
        path = (spec and spec.submodule_search_locations) or []
    return (spec and spec.has_location and spec.origin) or ""


def is_user_class(cls: type) -> bool:
    """True if the class is defined outside this package."""
    return cls.__module__.partition(".")[0] != __name__.partition(".")[0]


def definition_place(function: Callable[..., Any]) -> str:
    """file:line of a function's definition."""
    code = _code_object(function)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else repr(function)


def user_methods(cls: type) -> list[Callable[..., Any]]:
    """The methods of a class that are defined outside this package, inherited ones included."""
    return [f for owner in cls.__mro__ if is_user_class(owner) for f in vars(owner).values() if inspect.isfunction(f)]


def format_error(functions: list[Callable[..., Any]], error: BaseException) -> str:
    """The error's type, place and text; the place is file:line of its innermost frame, in a file of the functions if
    there is one."""
    files = {code.co_filename for code in map(_code_object, functions) if code}
    frames = traceback.extract_tb(error.__traceback__)
    frame = next((f for f in reversed(frames) if f.filename in files), frames[-1])
    return f"{type(error).__name__} at {frame.filename}:{frame.lineno}: {one_line(error)}"


def call_guarded(label: str, functions: list[Callable[..., Any]], call: Callable[[], Any]) -> Any:
    """Return `call()`. Turns an error into a UserError that names the label, and file and line in one of the user's
    functions; a UserError stays as it is."""
    try:
        return call()
    except (UserError, KeyboardInterrupt):  # Ctrl-C during the call
        raise
    except BaseException as error:  # SystemExit too: a user's function must not end the run
        raise UserError(f"{label} raised {format_error(functions, error)}") from error


def check_number(key: str, name: str, place: str, value: object) -> float:
    """The value as a float. place: file:line of the code that returned it. Raises UserError unless it is finite."""
    try:
        if isinstance(value, Real) and math.isfinite(value):
            return float(value)
        text = f"{value!r:.80}"
    except OverflowError:
        text = "a whole number that is too large for a float"
    raise UserError(f"{key}={name}: {place} must return a finite number; it returned {text}")


def call_for_number(key: str, name: str, function: Callable[..., Any], *args: object) -> float:
    """Call a user's function and return its finite number. Raises UserError, with file and line, for anything else."""
    value = call_guarded(f"{key}={name}", [function], lambda: function(*args))
    return check_number(key, name, definition_place(function), value)


def _code_object(function: Callable[..., Any]) -> CodeType | None:
    """Code of a function, a lambda or an object with __call__; None if it is not written in Python."""
    function = inspect.unwrap(function)
    code: CodeType | None = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    return code
