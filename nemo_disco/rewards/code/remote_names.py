"""Gives tests the names of a graded program that runs in another process, as values and as proxies of its objects.

Both processes are confined. ProgramServer runs in the program's, ProgramClient in the tests'; requests and replies are
lines of JSON on a socket. The client trusts no reply: it can only become plain values, exceptions and proxies. Imports
the standard library alone.
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
# Requests for an operation on a program's object; each names a function of `operator` or one of Python's built-ins.
_UNARY = ("len", "str", "repr", "bool", "iter", "next")
_BINARY = ("eq", "ne", "lt", "le", "gt", "ge", "add", "sub", "mul", "and", "or", "xor")


def encode(value: Any, encode_object: Callable[[Any], dict[str, Any]]) -> Any:
    """The value as JSON. encode_object: encodes an object that is no plain value, or raises TypeError."""

    def encode_all(items: Any) -> list[Any]:
        return [encode(item, encode_object) for item in items]

    if isinstance(value, int) and value.bit_length() > 1000:  # Python limits the decimal digits that it converts
        return {"int": hex(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (bytes, bytearray)):
        return {type(value).__name__: bytes(value).hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, list):
        return encode_all(value)
    if isinstance(value, (tuple, collections.deque)):
        return {"tuple" if isinstance(value, tuple) else "deque": encode_all(value)}
    if isinstance(value, Set):  # a dictionary's keys too
        return {"frozenset" if isinstance(value, frozenset) else "set": encode_all(value)}
    if isinstance(value, dict):
        return {"dict": [encode_all(pair) for pair in value.items()]}
    if type(value) in _REDUCED.values():
        return {"reduced": [type(value).__name__, encode_all(value.__reduce__()[1])]}
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        array = hasattr(value, "__len__")
        return {"array": [value.tolist(), str(value.dtype)]} if array else encode(value.item(), encode_object)
    return encode_object(value)


def decode(encoded: Any, decode_object: Callable[[dict[str, Any]], Any]) -> Any:
    """The value that `encode` encoded. Raises an Exception of any kind for other JSON."""
    if isinstance(encoded, list):
        return [decode(item, decode_object) for item in encoded]
    if not isinstance(encoded, dict):
        return encoded
    if len(encoded) > 1 or "exception" in encoded or "module" in encoded or "object" in encoded:
        return decode_object(encoded)
    [(kind, content)] = encoded.items()
    if kind == "int":
        return int(content, 16)
    if kind in ("bytes", "bytearray"):
        data = bytes.fromhex(content)
        return data if kind == "bytes" else bytearray(data)
    if kind == "complex":
        return complex(*content)
    if kind == "array":
        return importlib.import_module("numpy").array(content[0], dtype=content[1])
    if kind == "reduced":
        arguments = [decode(item, decode_object) for item in content[1]]
        return _REDUCED[content[0]](*arguments)
    if kind == "dict":
        return {decode(key, decode_object): decode(item, decode_object) for key, item in content}
    kinds: dict[str, Any] = {"tuple": tuple, "set": set, "frozenset": frozenset, "deque": collections.deque}
    return kinds[kind](decode(item, decode_object) for item in content)


def update_in_place(old: Any, new: Any) -> None:
    """Make a list, dictionary, set or array equal to the new one in place; inside lists of equal length too."""
    if type(old) is not type(new):
        return
    if isinstance(old, list):
        same_length = len(old) == len(new)
        for old_item, new_item in zip(old if same_length else (), new, strict=False):
            update_in_place(old_item, new_item)
        old[:] = [
            old_item if type(old_item) is type(new_item) and isinstance(old_item, (list, dict, set)) else new_item
            for old_item, new_item in zip(old, new, strict=True)
        ] if same_length else new  # fmt: skip
    elif isinstance(old, (dict, set)):
        old.clear()
        old.update(new)
    elif isinstance(old, (bytearray, collections.deque)):
        old.clear()
        old.extend(new)
    elif type(old).__name__ == "ndarray" and old.shape == new.shape:
        old[...] = new


class ProgramServer:
    """Runs in the program's process: performs the operations that the tests request."""

    def __init__(self, link: int, names: dict[str, Any], before: dict[str, Any]) -> None:
        """names: those of the program after it ran; before: the same before it ran. link: the socket's descriptor."""
        self._link, self._names = link, names
        self._objects: list[Any] = []
        self._numbers: dict[int, int] = {}  # id of an object: its index in _objects
        self._definitions = [name for name, value in names.items() if value is not before.get(name, self)]

    def serve(self) -> None:
        """Send the names that the program defines, then serve requests until the tests have ended."""
        with open(self._link, "rb", closefd=False) as lines:
            _send(self._link, self._definitions)
            for line in lines:
                _send(self._link, self._reply(json.loads(line)))

    def _reply(self, request: list[Any]) -> dict[str, Any]:
        arguments: list[Any] = []
        named: dict[str, Any] = {}
        try:
            action, *rest = request
            arguments, named = [decode(item, lambda encoded: self._objects[encoded["object"]]) for item in rest]
            value = self._perform(action, arguments, named)
            reply = {"value": encode(value, self._encode_object)}
        except BaseException as error:
            try:
                error_arguments = [encode(item, _refuse) for item in error.args]
            except TypeError:
                error_arguments = [str(error)]
            kinds = [kind.__name__ for kind in type(error).__mro__]
            reply = {"error": kinds, "error_arguments": error_arguments}
        return reply | {"arguments": [encode(item, self._encode_object) for item in (*arguments, *named.values())]}

    def _perform(self, action: str, arguments: list[Any], named: dict[str, Any]) -> Any:
        if action == "name":
            return self._names[arguments[0]]
        if action == "call":
            return arguments[0](*arguments[1:], **named)
        function: Any = getattr(builtins, action, None) or getattr(operator, action, None)
        return (function or getattr(operator, f"{action}_"))(*arguments)

    def _encode_object(self, value: Any) -> dict[str, Any]:
        if isinstance(value, type) and issubclass(value, BaseException):
            return {"exception": [kind.__name__ for kind in value.__mro__]}
        if isinstance(value, type(os)):
            return {"module": None}
        number = self._numbers.setdefault(id(value), len(self._objects))
        if number == len(self._objects):
            self._objects.append(value)  # a reference, so that no other object gets its id
        kind = "class" if isinstance(value, type) else "iterator" if hasattr(value, "__next__") else "object"
        kind = "function" if kind == "object" and type(value).__name__ in _FUNCTIONS else kind
        return {"object": number, "kind": kind, "class": (value if kind == "class" else type(value)).__name__}


_MODULE = object()  # stands for any module of the program; the name in the tests decides which one they get
_MODULES = sys.stdlib_module_names | {"numpy"}
_FUNCTIONS = ("function", "builtin_function_or_method", "method", "partial", "_lru_cache_wrapper")


class ProgramClient:
    """Runs in the tests' process: fetches the program's names and requests operations on its objects."""

    def __init__(self, link: int, fail: Callable[[bytes], NoReturn]) -> None:
        """fail: ends this process with a report, since no test may catch that the program has ended."""
        self._link, self._fail = link, fail
        self._lines: BinaryIO = open(link, "rb", closefd=False)  # noqa: SIM115 - never closed
        self._exceptions: dict[str, type[BaseException]] = {}
        self._classes: set[str] = set()
        self._remotes: dict[int, Remote] = {}

    def fetch_names(self, tests: str, before: dict[str, Any]) -> dict[str, Any]:
        """The names that the program defines and the tests use. before: the names that the tests have already.

        Without modules that the tests have, and without built-in names unless it is the only shared one: a program that
        defines `abs` changes no test.
        """
        modules = {name for name, value in before.items() if isinstance(value, type(os))}
        used, bound = _names_in(tests)
        shared = [n for n in self._read() if isinstance(n, str) and n in used - modules and not n.startswith("__")]
        names = [name for name in shared if not hasattr(builtins, name)]
        if not names and len(shared) > 1:
            raise NameError(f"the tests use {shared[0]}, which may be Python's or the program's")
        names = names or shared
        self._classes = {name for name in names if name[:1].isupper() and name not in bound}
        values = {name: self.request("name", name) for name in names}
        for name, value in values.items():
            if value is _MODULE:
                module = "numpy" if name == "np" else name
                values[name] = importlib.import_module(module) if module in _MODULES else None
        return values

    def request(self, action: str, *arguments: Any, **named: Any) -> Any:
        """Perform the action in the program's process and return its result. Raises the exception that it raised."""
        try:
            message = [action, encode(list(arguments), self._encode_object), encode(named, self._encode_object)]
        except (TypeError, RecursionError):
            traceback.print_exc()
            self._fail(UNSENDABLE)
        try:
            _send(self._link, message)
        except OSError:  # the program has ended
            self._fail(b"")
        reply = self._read()
        try:
            updates = [decode(item, self._decode_object) for item in reply["arguments"]]
            error = self._decode_error(reply) if "error" in reply else None
            value = None if error else decode(reply["value"], self._decode_object)
            for old, new in zip((*arguments, *named.values()), updates, strict=True):
                update_in_place(old, new)
        except Exception:
            self._fail(b"")
        if error:
            raise error
        return value

    def _read(self) -> Any:
        try:
            return json.loads(self._lines.readline())
        except (ValueError, RecursionError, OSError):  # the program has ended, or wrote something else
            self._fail(b"")

    def _encode_object(self, value: Any) -> dict[str, Any]:
        if isinstance(value, Remote):
            return {"object": object.__getattribute__(value, "_number")}
        raise TypeError(f"tests give the program a {type(value).__name__}, which is no plain value")

    def _decode_object(self, encoded: dict[str, Any]) -> Any:
        if "exception" in encoded:
            return self._exception_class(encoded["exception"])
        if "module" in encoded:
            return _MODULE
        kind, number = encoded["kind"], int(encoded["object"])
        usable = encoded["class"] in self._classes and kind in ("object", "class")
        kinds = {"iterator": RemoteIterator, "function": RemoteFunction, "class": RemoteFunction}
        remote = (RemoteObject if usable else kinds.get(kind, Remote))(self, number)
        return self._remotes.setdefault(number, remote)

    def _exception_class(self, kinds: list[str]) -> type[BaseException]:
        """Python's exception if the first of these names of an MRO is one, else a new subclass of the next that is."""
        python = next(kind for kind in kinds if isinstance(getattr(builtins, kind, None), type))
        base: type[BaseException] = getattr(builtins, python)
        if not issubclass(base, BaseException):
            raise TypeError(python)
        base = ProgramExit if base is SystemExit else base
        if python == kinds[0]:
            return base
        return self._exceptions.setdefault(kinds[0], type(kinds[0], (self._exception_class(kinds[1:]),), {}))

    def _decode_error(self, reply: dict[str, Any]) -> BaseException:
        kind, arguments = self._exception_class(reply["error"]), decode(reply["error_arguments"], self._decode_object)
        try:
            return kind(*arguments)
        except TypeError:
            return kind.__new__(kind)


class ProgramExit(SystemExit):
    """A SystemExit that the program raised; the tests do not pass by it as they do by their own."""


class Remote:
    """Proxy of a program's object that is no plain value. Tests can pass it back and read its data."""

    def __init__(self, client: ProgramClient, number: int) -> None:
        object.__setattr__(self, "_client", client)
        object.__setattr__(self, "_number", number)

    def __getattr__(self, name: str) -> Any:
        """An attribute that is data. A method is refused: it could return whatever makes the tests pass."""
        value = None if name.startswith("__") else _request(self, "getattr", name)
        if name.startswith("__") or type(value) in (RemoteFunction, RemoteIterator):
            raise AttributeError(name)
        return value


class RemoteFunction(Remote):
    """Proxy of a function of the program."""

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return _request(self, "call", *arguments, **named)


class RemoteIterator(Remote):
    """Proxy of a generator or another iterator of the program."""

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return _request(self, "next")


class RemoteObject(RemoteFunction):
    """Proxy of a class of the program that the tests name, or of an object of such a class."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _request(self, "getattr", name)

    def __setattr__(self, name: str, value: Any) -> None:
        _request(self, "setattr", name, value)

    def __instancecheck__(self, value: Any) -> bool:
        return isinstance(value, Remote) and bool(
            object.__getattribute__(self, "_client").request("isinstance", value, self)
        )

    def __getitem__(self, key: Any) -> Any:
        return _request(self, "getitem", key)

    def __setitem__(self, key: Any, value: Any) -> None:
        _request(self, "setitem", key, value)

    def __contains__(self, item: Any) -> bool:
        return bool(_request(self, "contains", item))

    def __hash__(self) -> int:
        return int(object.__getattribute__(self, "_number"))


def _request(remote: Remote, action: str, *arguments: Any, **named: Any) -> Any:
    client: ProgramClient = object.__getattribute__(remote, "_client")
    return client.request(action, remote, *arguments, **named)


def _define_operators() -> None:
    """Define RemoteObject's operators. Binary ones refuse a plain value: the program could forge an `==` with one."""

    def unary(name: str) -> Callable[[Any], Any]:
        return lambda self: _request(self, name)

    def binary(name: str) -> Callable[[Any, Any], Any]:
        return lambda self, other: _request(self, name, other) if isinstance(other, Remote) else NotImplemented

    for name in _UNARY:
        setattr(RemoteObject, f"__{name}__", unary(name))
    for name in _BINARY:
        setattr(RemoteObject, f"__{name}__", binary(name))


_define_operators()


def _names_in(tests: str) -> tuple[set[str], set[str]]:
    """The names that tests read, and those that they bind somewhere themselves."""
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
    write(link, json.dumps(message).encode() + b"\n")


def write(descriptor: int, data: bytes) -> None:
    """Write all data to the descriptor."""
    while data:
        data = data[os.write(descriptor, data) :]
