"""Reading what stands on disk: one reader for JSON, JSON lines and text, and one check of shape for all of them.

A file may be damaged, or be no file at all (a FIFO, a device, a directory, a link): each is one FileError, and nothing
hangs or takes more memory than the limits here allow. Writes nothing.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from nemo_disco.runtime.errors import UserError

T = TypeVar("T")
Count = Annotated[int, Field(ge=0, le=2**53)]  # for shapes
DOCUMENT = 64 << 20  # bytes of a JSON document; as Python objects up to thirty times that
LINE = 16 << 20  # bytes of one line of JSON lines


class FileError(UserError):
    """What is wrong with a file, and with which. `what`: without the file's name."""

    def __init__(self, path: Path | str, what: str) -> None:
        super().__init__(f"{path}: {what}")
        self.path, self.what = Path(path), what

    def __reduce__(self) -> tuple[Any, ...]:
        return FileError, (self.path, self.what)


class Line(NamedTuple):
    """One line of a file, counted from 1. value: what it says, or None where `fault` says what is wrong with it."""

    number: int
    raw: bytes
    value: Any
    fault: str


@contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """What the system refuses in here (a broken disk, a server that is away) is raised as a FileError of `path`."""
    try:
        yield
    except OSError as error:
        raise FileError(path, _said(error)) from error


def open_file(path: Path | str, *, links: bool = False) -> BufferedReader:
    """A regular file, open for reading. Raises FileError for anything else, at once.

    links: whether a symbolic link is followed, as a model's directory may hold; a run's own files are no links.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if links else os.O_NOFOLLOW)  # a FIFO would block
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        link = error.errno == errno.ELOOP and os.path.islink(path)
        raise FileError(path, _no_file(stat.S_IFLNK) if link else _said(error)) from None
    kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    if kind != stat.S_IFREG:
        os.close(descriptor)
        raise FileError(path, _no_file(kind))
    return os.fdopen(descriptor, "rb")


def check_file(path: Path | str, *, links: bool = False) -> None:
    """Raises FileError unless it is a regular file that can be read; for files that a library opens."""
    open_file(path, links=links).close()


def check_directory(path: Path | str) -> None:
    """Raises FileError where a directory, or one in it, holds a FIFO, a device or a socket: a library that opens it
    waits for ever."""
    with reading(path):
        entries = [*Path(path).iterdir(), *Path(path).glob("*/*")]
    for entry in entries:
        kind = stat.S_IFMT(entry.stat().st_mode) if entry.exists() else stat.S_IFREG
        if kind not in (stat.S_IFREG, stat.S_IFDIR):
            raise FileError(entry, _no_file(kind))


def read_bytes(path: Path | str, limit: int = DOCUMENT, *, links: bool = False) -> bytes:
    """All of a file of at most `limit` bytes. Raises FileError."""
    with open_file(path, links=links) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise FileError(path, f"damaged: {size:,} bytes, and such a file has at most {limit:,}")
        with reading(path):
            return file.read(limit)


def read_text(path: Path | str, limit: int = DOCUMENT, *, links: bool = False) -> str:
    """As `read_bytes`, of UTF-8 without NUL."""
    content = read_bytes(path, limit, links=links)
    if b"\0" in content:
        raise FileError(path, "damaged: a NUL byte in a text")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FileError(path, f"not UTF-8 text: byte 0x{content[error.start]:02x} at {error.start:,}") from None


def read_json(path: Path | str, shape: type[T], *, links: bool = False) -> T:
    """The JSON document of a file, of a shape: a TypedDict, or any type that pydantic checks. Raises FileError."""
    return parse_json(path, read_bytes(path, links=links), shape)


def check_shape(path: Path | str, value: Any, shape: type[T]) -> T:
    """As `parse_json`, of what was read from the file before."""
    try:
        checked: T = _adapter(shape).validate_python(value, strict=True)
    except ValidationError as error:
        raise FileError(path, _first(error)) from None
    return checked


def parse_json(path: Path | str, content: bytes, shape: type[T]) -> T:
    """What the bytes say. Types are strict, keys that the shape does not name are kept, depth is at most 200.

    Raises FileError, whose `what` names the first key that is not as it should be.
    """
    try:
        value: T = _adapter(shape).validate_json(content, strict=True)
    except ValidationError as error:
        raise FileError(path, _first(error)) from None
    return value


def read_json_lines(path: Path | str, shape: type[Any]) -> Iterator[Line]:
    """Each line of a file of JSON lines, blank ones too, with what is wrong with it. Ends at a line that is too long,
    of which it keeps the beginning. Raises FileError where there is no such file."""
    with open_file(path) as file, reading(path):
        number = 0
        while raw := file.readline(LINE):
            number += 1
            if len(raw) == LINE and not raw.endswith(b"\n"):
                yield Line(number, raw[:100], None, f"longer than {LINE:,} bytes; what follows is left out")
                return
            try:
                yield Line(number, raw, parse_json(path, raw, shape), "")
            except FileError as fault:
                yield Line(number, raw, None, fault.what)


_adapters: dict[Any, TypeAdapter[Any]] = {}


def _adapter(shape: Any) -> TypeAdapter[Any]:
    if shape not in _adapters:
        _adapters[shape] = TypeAdapter(shape)
    return _adapters[shape]


def _first(error: ValidationError) -> str:
    """The first of pydantic's complaints in a few words."""
    detail = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(map(str, detail["loc"]))
    said = detail["msg"].replace("Input should be", "it should be").replace("Field required", "it is missing")
    if detail["type"] == "json_invalid":
        return f"not valid JSON: {said.removeprefix('Invalid JSON: ')}"
    if detail["type"] == "dict_type" and not where:
        return "not a JSON object"
    return f"damaged: `{where}`: {said}" if where else f"damaged: {said}"


def _no_file(kind: int) -> str:
    names = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a FIFO", stat.S_IFLNK: "a symbolic link"}
    return f"{names.get(kind, 'a device or socket')} stands where a file should"


def _said(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return "is missing"
    if error.errno == errno.ENXIO:
        return _no_file(stat.S_IFSOCK)
    return f"cannot be read ({error.strerror})"
