"""Runs one graded program inside the confined process of sandbox_server.py, as `python answer.py` would.

Imports the standard library alone. A job is two lines of JSON: the candidates for the program, and what to do with the
names that it defines: nothing, calls of a function, expressions, or an answer to all that tests ask (remote_names.py).
Or it is such tests, without a program. Outputs to compare with never come to a program's process.
"""

from __future__ import annotations

import _thread
import atexit
import bisect
import builtins
import collections
import contextlib
import copy
import datetime  # noqa: F401 - loaded once in the server, so that no program waits for it; so are those below
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

ANSWER = "<answer>"
FILE = "answer.py"
LARGEST_STACK = 128 << 20  # of a thread: programs ask for a gigabyte, which would count as memory that they use
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


def _leetcode_names() -> dict[str, Any]:
    """What LeetCode has imported before an answer runs; none of it hides a built-in name."""
    names: dict[str, Any] = {name: getattr(typing, name) for name in typing.__all__}
    names |= {"ListNode": nodes.ListNode, "TreeNode": nodes.TreeNode}
    names |= {module.__name__: module for module in (*_MODULES, statistics)}
    for module, listed in _NAMES:
        names |= {name: getattr(module, name) for name in listed.split()}
    return names


LEETCODE = _leetcode_names()


def run(job: int, report: int, link: int) -> int:
    """Run the job of that descriptor; returns the exit code that Python would give.

    report: descriptor for what calls returned, or the token of tests that passed; link: socket between a program and
    its tests, which has a number only for these.
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


def exit_now(code: int) -> NoReturn:
    """End the process as Python ends: wait for threads, run exit functions, flush, let go of the program's objects."""
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
    if not as_module:
        file.close()
        exec(_compiled(sources), _names("__main__"))
        return
    test = json.loads(file.readline())
    # A program is not __main__ here, where a function's own demonstration would read an input.
    names = _names("__main__" if "tests" in test else "answer")
    names.update(LEETCODE)
    before = dict(names)
    if "tests" in test:
        _run_tests(test, names, report, link)
        return
    with contextlib.suppress(SystemExit):
        exec(_compiled(sources), names)
    if "linked" in test:
        remote_names.Program(link, names, before).serve()
    elif "expressions" in test:
        exec(compile(test["setup"], "<tests>", "exec", dont_inherit=True), names)
        values = [eval(compile(text, "<tests>", "eval", dont_inherit=True), names) for text in test["expressions"]]
        _write(report, json.dumps([encode_plain(value) for value in values]).encode())
    else:
        returned = [_call(names, test["function"], given) for given in test["calls"]]
        _write(report, json.dumps(returned).encode())


def _run_tests(test: dict[str, Any], names: dict[str, Any], report: int, link: int) -> None:
    """Write the token where the tests pass with the names of the program at the link's other end."""

    def fail(reason: bytes) -> NoReturn:
        _write(report, reason)
        _really_exit(1)

    names.update(remote_names.Tests(link, fail).names(test["tests"], dict(names)))
    try:
        exec(compile(test["tests"], "<tests>", "exec", dont_inherit=True), names)
    except SystemExit as error:  # as `unittest.main()` ends
        if error.code or type(error) is not SystemExit:  # the program's own is a ProgramExit
            raise
    _write(report, test["token"].encode())


def _compiled(sources: list[str]) -> types.CodeType:
    """The first source that is Python. Raises the first one's SyntaxError if none is."""
    problem: Exception | None = None
    for source in sources:
        try:
            return compile(source, ANSWER, "exec", dont_inherit=True)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            problem = problem or error
    raise problem or ValueError("no program")


def _names(module_name: str) -> dict[str, Any]:
    """The names of a fresh module that `pickle`, `dataclasses` and `typing` find as any other."""
    module = types.ModuleType(module_name)
    sys.modules[module_name] = module
    sys.argv = [FILE]
    module.__dict__["__builtins__"] = builtins
    module.__dict__["__file__"] = FILE
    return module.__dict__


def _function(names: dict[str, Any], name: str) -> Callable[..., Any]:
    """The function of that name, or the method of a fresh `Solution`."""
    solution = names.get("Solution")
    if isinstance(solution, type) and hasattr(solution, name):
        method: Callable[..., Any] = getattr(solution(), name)
        return method
    function: Callable[..., Any] = names[name]
    return function


def _call(names: dict[str, Any], name: str, given: list[Any]) -> Any:
    """What the function of that name returns, plain."""
    function = _function(names, name)
    returned = function(*nodes.arguments(function, [_argument(item) for item in given], names))
    return [] if returned is None and nodes.returned_by(function) else encode_plain(returned)


def _argument(given: Any) -> Any:
    """JSON makes texts of a dictionary's integers."""
    if isinstance(given, dict) and given and all(key.lstrip("-").isdecimal() for key in given):
        return {int(key): value for key, value in given.items()}
    return given


def encode_plain(value: Any) -> Any:
    """The value as JSON that `gold_tests.decode_plain` reads back. Raises TypeError for what is not plain data."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [encode_plain(item) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [encode_plain(item) for item in value]}
    if isinstance(value, Set):  # a dictionary's keys are one
        return {"set": [encode_plain(item) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[encode_plain(key), encode_plain(item)] for key, item in value.items()]}
    if isinstance(value, (Decimal, Fraction)):
        return {"ratio": list(value.as_integer_ratio())}
    if hasattr(value, "tolist"):  # numpy's
        return encode_plain(value.tolist())
    if (listed := nodes.as_list(value)) is not None:
        return encode_plain(listed)
    raise TypeError(f"a {type(value).__name__} was returned")


def _attach_streams() -> None:
    """The standard streams of this process, whose descriptors are new."""
    shared: dict[str, Any] = {"encoding": "utf-8", "errors": "surrogateescape", "closefd": False}
    sys.stdin = sys.__stdin__ = open(0, **shared)  # type: ignore[misc]  # noqa: SIM115 - held to the end
    sys.stdout = sys.__stdout__ = open(1, "w", **shared)  # type: ignore[misc]  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", **shared, buffering=1)  # type: ignore[misc]  # noqa: SIM115


def _exit_after_flush(status: int) -> NoReturn:
    """`os._exit`, without losing what was printed to the file that stands where a terminal would."""
    _flush()
    _really_exit(status)


def _stack_size(size: int = 0) -> int:
    return _set_stack_size(min(size, LARGEST_STACK))


def _release(names: dict[str, Any]) -> None:
    """Let a program's names go, as Python does at its end: what it wrote to a file of its own is then written out."""
    if names.get("__file__") == FILE:
        for name in [name for name in names if not name.startswith("__")]:
            names[name] = None


def _flush() -> bool:
    """Whether all that was printed could be written."""
    complete = True
    for stream in (sys.stdout, sys.stderr, sys.__stdout__):
        try:
            if stream is not None and not getattr(stream, "closed", False):
                stream.flush()
        except Exception:  # where a program put another in its place, the first one may be of no use
            complete = complete and stream is sys.__stdout__ is not sys.stdout
    return complete


def _exit_code(error: SystemExit) -> int:
    if error.code is None:
        return 0
    if isinstance(error.code, int):
        return error.code & 0xFF
    print(error.code, file=sys.stderr)
    return 1


def _write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
