"""Runs one job inside a confined process that sandbox_server.py forked: a program, as `python answer.py` would.

A job is two lines of JSON: the candidates for the program, and what to do after it ran: nothing, call a function,
evaluate expressions, or serve its names to tests in a second such process (remote_names.py), whose job those tests are.
Imports the standard library alone. Expected outputs never enter a program's process.
"""

from __future__ import annotations

import _thread
import atexit
import bisect
import builtins
import collections
import contextlib
import copy
import datetime  # noqa: F401 - the server loads it, and the unused ones below, so that no program waits for it
import functools
import heapq
import io  # noqa: F401
import itertools
import json
import math
import operator
import os
import random
import re
import statistics
import string
import sys
import threading
import traceback
import types
import typing
from collections.abc import Callable, Set
from decimal import Decimal
from fractions import Fraction
from typing import Any, BinaryIO, NoReturn

import nodes  # type: ignore[import-not-found]
import remote_names  # type: ignore[import-not-found]

SOURCE_NAME = "<answer>"
FILE = "answer.py"
MAX_STACK_BYTES = 128 << 20  # of a thread: programs request a gigabyte, which would count as memory that they use
_really_exit = os._exit
_set_stack_size = threading.stack_size
_MODULES = (bisect, collections, copy, functools, heapq, itertools, json, math, operator, random, re, string, sys)
_NAMES = (
    (collections, "Counter OrderedDict defaultdict deque namedtuple"),
    (functools, "cache cmp_to_key lru_cache reduce"),
    (heapq, "heapify heappop heappush heappushpop heapreplace nlargest nsmallest"),
    (bisect, "bisect bisect_left bisect_right insort insort_left insort_right"),
    (itertools, "accumulate chain combinations count cycle groupby pairwise permutations product repeat zip_longest"),
    (math, "ceil comb floor gcd inf isqrt lcm log log2 perm sqrt"),
)


# The names that LeetCode imports before an answer runs; none of them hides a built-in name.
LEETCODE: dict[str, Any] = {name: getattr(typing, name) for name in typing.__all__}
LEETCODE |= {"ListNode": nodes.ListNode, "TreeNode": nodes.TreeNode}
LEETCODE |= {module.__name__: module for module in (*_MODULES, statistics)}
LEETCODE |= {name: getattr(module, name) for module, listing in _NAMES for name in listing.split()}


def run(job: int, report: int, link: int) -> int:
    """Run the job in the file `job` (a descriptor) and return the exit code that Python would give.

    report: descriptor to which values of calls, or the token of passed tests, are written. link: descriptor of the
    socket between a program and its tests, -1 for other jobs.
    """
    _attach_streams()
    os._exit = _exit_after_flush
    threading.stack_size = _thread.stack_size = _stack_size
    with open(job, "rb") as file:
        sources, as_module = json.loads(file.readline())
        try:
            _run_job(sources, as_module, file, report, link)
            return 0
        except SystemExit as error:
            return _exit_code(error)
        except BaseException:
            traceback.print_exc()
            return 1


def exit_as_python(code: int) -> NoReturn:
    """End the process as Python does: wait for threads, run exit functions, release the program's objects, flush."""
    try:
        with contextlib.suppress(BaseException):
            threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        code = code or int(not _flush())
        with contextlib.suppress(BaseException):
            _release(sys.modules["__main__"].__dict__)
            _flush()
    finally:
        _really_exit(code)


def _run_job(sources: list[str], as_module: bool, file: BinaryIO, report: int, link: int) -> None:
    """Run the program, then use its names as the job's second line requests; a job of tests runs them instead."""
    if not as_module:
        file.close()
        exec(_compile(sources), _make_module("__main__"))
        return
    test = json.loads(file.readline())
    # Not "__main__" for a program: a demonstration under `if __name__ == "__main__"` would wait for an input.
    names = _make_module("__main__" if "tests" in test else "answer")
    names.update(LEETCODE)
    before = dict(names)
    if "tests" in test:
        _run_tests(test, names, report, link)
        return
    with contextlib.suppress(SystemExit):
        exec(_compile(sources), names)
    if "linked" in test:
        remote_names.ProgramServer(link, names, before).serve()
    elif "expressions" in test:
        exec(compile(test["setup"], "<tests>", "exec", dont_inherit=True), names)
        values = [eval(compile(text, "<tests>", "eval", dont_inherit=True), names) for text in test["expressions"]]
        remote_names.write(report, json.dumps([encode_plain(value) for value in values]).encode())
    else:
        values = [_call(names, test["function"], arguments) for arguments in test["calls"]]
        remote_names.write(report, json.dumps(values).encode())


def _run_tests(test: dict[str, Any], names: dict[str, Any], report: int, link: int) -> None:
    """Run the tests with the names of the program at the link's other end; write the token if they pass."""

    def fail(reason: bytes) -> NoReturn:
        remote_names.write(report, reason)
        _really_exit(1)

    names.update(remote_names.ProgramClient(link, fail).fetch_names(test["tests"], dict(names)))
    try:
        exec(compile(test["tests"], "<tests>", "exec", dont_inherit=True), names)
    except SystemExit as error:  # raised by `unittest.main()` too
        if error.code or type(error) is not SystemExit:  # a ProgramExit comes from the program
            raise
    remote_names.write(report, test["token"].encode())


def _compile(sources: list[str]) -> types.CodeType:
    """Compile the first source that is valid Python. Raises the first one's SyntaxError if none is."""
    first_error: Exception | None = None
    for source in sources:
        try:
            return compile(source, SOURCE_NAME, "exec", dont_inherit=True)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            first_error = first_error or error
    raise first_error or ValueError("no program")


def _make_module(module_name: str) -> dict[str, Any]:
    """The names of a new module in sys.modules, where `pickle`, `dataclasses` and `typing` look for it."""
    module = types.ModuleType(module_name)
    sys.modules[module_name] = module
    sys.argv = [FILE]
    module.__dict__["__builtins__"] = builtins
    module.__dict__["__file__"] = FILE
    return module.__dict__


def _find_function(names: dict[str, Any], name: str) -> Callable[..., Any]:
    """The function of that name, or the method of a new `Solution()`."""
    solution = names.get("Solution")
    is_method = isinstance(solution, type) and hasattr(solution, name)
    function: Callable[..., Any] = getattr(names["Solution"](), name) if is_method else names[name]
    return function


def _call(names: dict[str, Any], name: str, arguments: list[Any]) -> Any:
    """Call the function of that name and encode its return value."""
    function = _find_function(names, name)
    value = function(*nodes.decode_arguments(function, [_restore_keys(item) for item in arguments], names))
    return [] if value is None and nodes.returns_node(function) else encode_plain(value)


def _restore_keys(argument: Any) -> Any:
    """Turn the keys of a dictionary back into integers, which JSON had made texts."""
    if isinstance(argument, dict) and argument and all(key.lstrip("-").isdecimal() for key in argument):
        return {int(key): value for key, value in argument.items()}
    return argument


def encode_plain(value: Any) -> Any:
    """The value as JSON that `gold_tests.decode_plain` reads back. Raises TypeError for anything but plain data."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [encode_plain(item) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [encode_plain(item) for item in value]}
    if isinstance(value, Set):  # a dictionary's keys too
        return {"set": [encode_plain(item) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[encode_plain(key), encode_plain(item)] for key, item in value.items()]}
    if isinstance(value, (Decimal, Fraction)):
        return {"ratio": list(value.as_integer_ratio())}
    if hasattr(value, "tolist"):  # numpy's
        return encode_plain(value.tolist())
    if (items := nodes.as_list(value)) is not None:
        return encode_plain(items)
    raise TypeError(f"a {type(value).__name__} was returned")


def _attach_streams() -> None:
    """Open the standard streams again, on this process's own descriptors."""
    shared: dict[str, Any] = {"encoding": "utf-8", "errors": "surrogateescape", "closefd": False}
    sys.stdin = sys.__stdin__ = open(0, **shared)  # type: ignore[misc]  # noqa: SIM115 - never closed
    sys.stdout = sys.__stdout__ = open(1, "w", **shared)  # type: ignore[misc]  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", **shared, buffering=1)  # type: ignore[misc]  # noqa: SIM115


def _exit_after_flush(status: int) -> NoReturn:
    """Flush, then exit as `os._exit`: output to a file is buffered where a terminal's would not be."""
    _flush()
    _really_exit(status)


def _stack_size(size: int = 0) -> int:
    return _set_stack_size(min(size, MAX_STACK_BYTES))


def _release(names: dict[str, Any]) -> None:
    """Set a program's names to None, as Python does at its end, so that its open files are flushed and closed."""
    if names.get("__file__") == FILE:
        for name in [name for name in names if not name.startswith("__")]:
            names[name] = None


def _flush() -> bool:
    """Flush the output streams. False if a write failed."""
    complete = True
    for stream in (sys.stdout, sys.stderr, sys.__stdout__):
        try:
            if stream is not None and not getattr(stream, "closed", False):
                stream.flush()
        except Exception:  # a failure of the first stdout does not count if the program has replaced it
            complete = complete and stream is sys.__stdout__ is not sys.stdout
    return complete


def _exit_code(error: SystemExit) -> int:
    if error.code is None:
        return 0
    if isinstance(error.code, int):
        return error.code & 0xFF
    print(error.code, file=sys.stderr)
    return 1
