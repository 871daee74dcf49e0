"""The names of a graded program in the process of its tests: values, and stand-ins that ask the program's process.

Each end of a socket sends lines of JSON. The end of the tests believes nothing: an answer can only be a value, one of
Python's exceptions, or a number that stands for an object. Imports the standard library alone.
"""

from __future__ import annotations

import ast
import builtins
import collections
import datetime
import decimal
import fractions
import importlib
import json
import operator
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Set
from typing import Any, BinaryIO, NoReturn

UNSENDABLE = b"unsendable"
_really_exit = os._exit
_REDUCED = {
    kind.__name__: kind
    for kind in (decimal.Decimal, fractions.Fraction, datetime.date, datetime.datetime, datetime.timedelta, range)
}
# What is done to an object of the program beside calling it; each name is one of `operator` or of Python's built-ins.
_ALONE = ("len", "str", "repr", "bool", "iter", "next")
_WITH_OBJECTS = ("eq", "ne", "lt", "le", "gt", "ge", "add", "sub", "mul", "and", "or", "xor")


def encode(value: Any, number: Callable[[Any], dict[str, Any]]) -> Any:
    """The value as JSON. number: what to send for an object that is no plain value; it may raise TypeError."""

    def each(items: Any) -> list[Any]:
        return [encode(item, number) for item in items]

    if isinstance(value, int) and value.bit_length() > 1000:  # decimal digits have a limit
        return {"int": hex(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (bytes, bytearray)):
        return {type(value).__name__: bytes(value).hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, list):
        return each(value)
    if isinstance(value, (tuple, collections.deque)):
        return {"tuple" if isinstance(value, tuple) else "deque": each(value)}
    if isinstance(value, Set):  # a dictionary's keys are one
        return {"frozenset" if isinstance(value, frozenset) else "set": each(value)}
    if isinstance(value, dict):
        return {"dict": [each(pair) for pair in value.items()]}
    if type(value) in _REDUCED.values():
        return {"reduced": [type(value).__name__, each(value.__reduce__()[1])]}
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return (
            {"array": [value.tolist(), str(value.dtype)]} if hasattr(value, "__len__") else encode(value.item(), number)
        )
    return number(value)


def decode(read: Any, objects: Callable[[dict[str, Any]], Any]) -> Any:
    """What `encode` wrote. Raises an Exception of any kind for other JSON."""
    if isinstance(read, list):
        return [decode(item, objects) for item in read]
    if not isinstance(read, dict):
        return read
    if len(read) > 1 or "exception" in read or "module" in read or "object" in read:
        return objects(read)
    [(kind, given)] = read.items()
    if kind == "int":
        return int(given, 16)
    if kind in ("bytes", "bytearray"):
        data = bytes.fromhex(given)
        return data if kind == "bytes" else bytearray(data)
    if kind == "complex":
        return complex(*given)
    if kind == "array":
        return importlib.import_module("numpy").array(given[0], dtype=given[1])
    if kind == "reduced":
        arguments = [decode(item, objects) for item in given[1]]
        return _REDUCED[given[0]](*arguments)
    if kind == "dict":
        return {decode(key, objects): decode(item, objects) for key, item in given}
    kinds: dict[str, Any] = {"tuple": tuple, "set": set, "frozenset": frozenset, "deque": collections.deque}
    return kinds[kind](decode(item, objects) for item in given)


def update(old: Any, new: Any) -> None:
    """Make a list, dictionary, set or array equal to the new one in place, and those within lists where they match."""
    if type(old) is not type(new):
        return
    if isinstance(old, list):
        within = old if len(old) == len(new) else ()
        for mine, its in zip(within, new, strict=False):
            update(mine, its)
        old[:] = [
            mine if type(mine) is type(its) and isinstance(mine, (list, dict, set)) else its
            for mine, its in zip(old, new, strict=True)
        ] if within else new  # fmt: skip
    elif isinstance(old, (dict, set)):
        old.clear()
        old.update(new)
    elif isinstance(old, (bytearray, collections.deque)):
        old.clear()
        old.extend(new)
    elif type(old).__name__ == "ndarray" and old.shape == new.shape:
        old[...] = new


class Program:
    """The end of the program: does what the tests ask for."""

    def __init__(self, link: int, names: dict[str, Any], before: dict[str, Any]) -> None:
        """names: of the program after it ran; before: those that it was given."""
        self._link, self._names = link, names
        self._objects: list[Any] = []
        self._numbers: dict[int, int] = {}
        self._defined = [name for name, value in names.items() if value is not before.get(name, self)]

    def serve(self) -> None:
        """Until the tests have ended."""
        with open(self._link, "rb", closefd=False) as lines:
            _send(self._link, self._defined)
            for line in lines:
                _send(self._link, self._answer(json.loads(line)))

    def _answer(self, request: list[Any]) -> dict[str, Any]:
        arguments: list[Any] = []
        named: dict[str, Any] = {}
        try:
            action, *rest = request
            arguments, named = [decode(item, lambda read: self._objects[read["object"]]) for item in rest]
            value = self._do(action, arguments, named)
            answer = {"value": encode(value, self._number)}
        except BaseException as error:
            try:
                texts = [encode(item, _refuse) for item in error.args]
            except TypeError:
                texts = [str(error)]
            kinds = [kind.__name__ for kind in type(error).__mro__]
            answer = {"error": kinds, "texts": texts}
        return answer | {"arguments": [encode(item, self._number) for item in (*arguments, *named.values())]}

    def _do(self, action: str, arguments: list[Any], named: dict[str, Any]) -> Any:
        if action == "name":
            return self._names[arguments[0]]
        if action == "call":
            return arguments[0](*arguments[1:], **named)
        does: Any = getattr(builtins, action, None) or getattr(operator, action, None)
        return (does or getattr(operator, f"{action}_"))(*arguments)

    def _number(self, value: Any) -> dict[str, Any]:
        if isinstance(value, type) and issubclass(value, BaseException):
            return {"exception": [kind.__name__ for kind in value.__mro__]}
        if isinstance(value, type(os)):
            return {"module": None}
        at = self._numbers.setdefault(id(value), len(self._objects))
        if at == len(self._objects):
            self._objects.append(value)  # held, so that no other object gets its identity
        kind = "class" if isinstance(value, type) else "iterator" if hasattr(value, "__next__") else "object"
        kind = "function" if kind == "object" and type(value).__name__ in _FUNCTIONS else kind
        return {"object": at, "kind": kind, "class": (value if kind == "class" else type(value)).__name__}


_MODULE = object()  # stands for any module: which one is meant, only the name in the tests says
_MODULES = sys.stdlib_module_names | {"numpy"}
_FUNCTIONS = ("function", "builtin_function_or_method", "method", "partial", "_lru_cache_wrapper")


class Tests:
    """The end of the tests: gives them the program's names, and asks for what is done with these."""

    def __init__(self, link: int, fail: Callable[[bytes], NoReturn]) -> None:
        """fail: ends this process, with a report; no test may catch that the program has ended."""
        self._link, self._fail = link, fail
        self._lines: BinaryIO = open(link, "rb", closefd=False)  # noqa: SIM115 - held to the end
        self._exceptions: dict[str, type[BaseException]] = {}
        self._classes: set[str] = set()
        self._remotes: dict[int, Remote] = {}

    def names(self, tests: str, before: dict[str, Any]) -> dict[str, Any]:
        """What the program defines of the names that the tests use.

        Not modules that tests have, nor Python's own names, unless it is the one thing that they share: a program that
        defines `abs` changes no test.
        """
        modules = {name for name, value in before.items() if isinstance(value, type(os))}
        used, bound = _names_in(tests)
        shared = [n for n in self._read() if isinstance(n, str) and n in used - modules and not n.startswith("__")]
        own = [name for name in shared if not hasattr(builtins, name)]
        if not own and len(shared) > 1:
            raise NameError(f"the tests' {shared[0]} may be Python's or the program's")
        own = own or shared
        self._classes = {name for name in own if name[:1].isupper() and name not in bound}
        values = {name: self.ask("name", name) for name in own}
        for name, value in values.items():
            if value is _MODULE:
                module = "numpy" if name == "np" else name
                values[name] = importlib.import_module(module) if module in _MODULES else None
        return values

    def ask(self, action: str, *arguments: Any, **named: Any) -> Any:
        """What the program answers. Raises what the program raised."""
        try:
            request = [action, encode(list(arguments), self._number), encode(named, self._number)]
        except (TypeError, RecursionError):
            traceback.print_exc()
            self._fail(UNSENDABLE)
        try:
            _send(self._link, request)
        except OSError:  # the program has ended
            self._fail(b"")
        answer = self._read()
        try:
            changed = [decode(item, self._object) for item in answer["arguments"]]
            error = self._error(answer["error"], decode(answer["texts"], self._object)) if "error" in answer else None
            value = None if error else decode(answer["value"], self._object)
            for mine, its in zip((*arguments, *named.values()), changed, strict=True):
                update(mine, its)
        except Exception:
            self._fail(b"")
        if error:
            raise error
        return value

    def _read(self) -> Any:
        try:
            return json.loads(self._lines.readline())
        except (ValueError, RecursionError, OSError):  # the program has ended, or writes something else
            self._fail(b"")

    def _number(self, value: Any) -> dict[str, Any]:
        if isinstance(value, Remote):
            return {"object": object.__getattribute__(value, "_at")}
        raise TypeError(f"tests give the program a {type(value).__name__}, which is no plain value")

    def _object(self, read: dict[str, Any]) -> Any:
        if "exception" in read:
            return self._exception(read["exception"])
        if "module" in read:
            return _MODULE
        kind, name = read["kind"], read["class"]
        own = name in self._classes and kind in ("object", "class")
        kinds = {"iterator": RemoteIterator, "function": RemoteFunction, "class": RemoteFunction}
        remote = (RemoteObject if own else kinds.get(kind, Remote))(self, int(read["object"]))
        return self._remotes.setdefault(int(read["object"]), remote)

    def _exception(self, kinds: list[str]) -> type[BaseException]:
        """Python's exception of the first name that is one, or below it the program's own."""
        python = next(kind for kind in kinds if isinstance(getattr(builtins, kind, None), type))
        base: type[BaseException] = getattr(builtins, python)
        if not issubclass(base, BaseException):
            raise TypeError(python)
        base = ProgramExit if base is SystemExit else base
        if python == kinds[0]:
            return base
        return self._exceptions.setdefault(kinds[0], type(kinds[0], (self._exception(kinds[1:]),), {}))

    def _error(self, kinds: list[str], texts: list[Any]) -> BaseException:
        kind = self._exception(kinds)
        try:
            return kind(*texts)
        except TypeError:
            return kind.__new__(kind)


class ProgramExit(SystemExit):
    """A SystemExit of the program, which ends no tests well."""


class Remote:
    """An object of the program that is no plain value: it equals nothing; it can be given back, and has attributes."""

    def __init__(self, tests: Tests, at: int) -> None:
        object.__setattr__(self, "_tests", tests)
        object.__setattr__(self, "_at", at)

    def __getattr__(self, name: str) -> Any:
        """Data alone, which the tests compare themselves: a method could answer what they want to hear."""
        value = None if name.startswith("__") else _ask(self, "getattr", name)
        if name.startswith("__") or type(value) in (RemoteFunction, RemoteIterator):
            raise AttributeError(name)
        return value


class RemoteFunction(Remote):
    """A function of the program."""

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return _ask(self, "call", *arguments, **named)


class RemoteIterator(Remote):
    """A generator or another iterator of the program."""

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return _ask(self, "next")


class RemoteObject(RemoteFunction):
    """A class of the program that tests name, or an object of one."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _ask(self, "getattr", name)

    def __setattr__(self, name: str, value: Any) -> None:
        _ask(self, "setattr", name, value)

    def __instancecheck__(self, value: Any) -> bool:
        return isinstance(value, Remote) and bool(
            object.__getattribute__(self, "_tests").ask("isinstance", value, self)
        )

    def __getitem__(self, key: Any) -> Any:
        return _ask(self, "getitem", key)

    def __setitem__(self, key: Any, value: Any) -> None:
        _ask(self, "setitem", key, value)

    def __contains__(self, item: Any) -> bool:
        return bool(_ask(self, "contains", item))

    def __hash__(self) -> int:
        return int(object.__getattribute__(self, "_at"))


def _ask(remote: Remote, action: str, *arguments: Any, **named: Any) -> Any:
    tests: Tests = object.__getattribute__(remote, "_tests")
    return tests.ask(action, remote, *arguments, **named)


def _give_operators() -> None:
    """Those of RemoteObject. With a plain value none is asked for: the program would answer what tests want to hear."""

    def alone(name: str) -> Callable[[Any], Any]:
        return lambda self: _ask(self, name)

    def with_object(name: str) -> Callable[[Any, Any], Any]:
        return lambda self, other: _ask(self, name, other) if isinstance(other, Remote) else NotImplemented

    for name in _ALONE:
        setattr(RemoteObject, f"__{name}__", alone(name))
    for name in _WITH_OBJECTS:
        setattr(RemoteObject, f"__{name}__", with_object(name))


_give_operators()


def _names_in(tests: str) -> tuple[set[str], set[str]]:
    """The names that tests use, and those that they bind somewhere themselves."""
    used: set[str] = set()
    bound: set[str] = set()
    for node in ast.walk(ast.parse(tests)):
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            bound.add(node.name)
        elif isinstance(node, ast.alias):
            bound.add(node.asname or node.name)
    return used, bound


def _refuse(value: Any) -> dict[str, Any]:
    raise TypeError(type(value).__name__)


def _send(link: int, message: Any) -> None:
    data = json.dumps(message).encode() + b"\n"
    while data:
        data = data[os.write(link, data) :]
