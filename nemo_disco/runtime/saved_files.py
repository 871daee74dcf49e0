"""Reading saved files: one reader for JSON, JSON lines and text, and one check of their types.

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
    """A problem with a file. path: the file; problem: the message without the path."""

    def __init__(self, path: Path | str, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path, self.problem = Path(path), problem

    def __reduce__(self) -> tuple[Any, ...]:
        return FileError, (self.path, self.problem)


class Line(NamedTuple):
    """One line of a file, numbered from 1. value: its JSON value, or None if it has a `fault`, a message."""

    number: int
    raw: bytes
    value: Any
    fault: str


@contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """Turn an OSError of this block (a broken disk, a server that is away) into a FileError of `path`."""
    try:
        yield
    except OSError as error:
        raise FileError(path, _reason(error)) from error


def open_file(path: Path | str, *, links: bool = False) -> BufferedReader:
    """Open a regular file for reading. Raises FileError for anything else, at once.

    links: follow a symbolic link, which a model's directory may hold; a run's own files are no links.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if links else os.O_NOFOLLOW)  # a FIFO would block
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        link = error.errno == errno.ELOOP and os.path.islink(path)
        raise FileError(path, _not_a_file(stat.S_IFLNK) if link else _reason(error)) from None
    kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    if kind != stat.S_IFREG:
        os.close(descriptor)
        raise FileError(path, _not_a_file(kind))
    return os.fdopen(descriptor, "rb")


def check_file(path: Path | str, *, links: bool = False) -> None:
    """Raise FileError unless the path is a regular file that can be read; for files that a library opens."""
    open_file(path, links=links).close()


def check_directory(path: Path | str) -> None:
    """Raise FileError if a directory, or one in it, holds a FIFO, a device or a socket: a library that opened it would
    wait for ever."""
    with reading(path):
        entries = [*Path(path).iterdir(), *Path(path).glob("*/*")]
    for entry in entries:
        kind = stat.S_IFMT(entry.stat().st_mode) if entry.exists() else stat.S_IFREG
        if kind not in (stat.S_IFREG, stat.S_IFDIR):
            raise FileError(entry, _not_a_file(kind))


def read_bytes(path: Path | str, limit: int = DOCUMENT, *, links: bool = False) -> bytes:
    """All of a file of at most `limit` bytes. Raises FileError."""
    with open_file(path, links=links) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise FileError(path, f"damaged: {size:,} bytes, and such a file has at most {limit:,}")
        with reading(path):
            return file.read(limit)


def read_text(path: Path | str, limit: int = DOCUMENT, *, links: bool = False) -> str:
    """The text of a UTF-8 file without NUL, of at most `limit` bytes. Raises FileError."""
    content = read_bytes(path, limit, links=links)
    if b"\0" in content:
        raise FileError(path, "damaged: a NUL byte in a text")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FileError(path, f"not UTF-8 text: byte 0x{content[error.start]:02x} at {error.start:,}") from None


def read_json(path: Path | str, schema: type[T], *, links: bool = False) -> T:
    """The JSON document of a file. schema: a TypedDict, or any type that pydantic checks. Raises FileError."""
    return parse_json(path, read_bytes(path, links=links), schema)


def check_types(path: Path | str, value: Any, schema: type[T]) -> T:
    """Return `value`, which was read from the file, if it fits the schema. Raises FileError as `parse_json` does."""
    try:
        checked: T = _adapter(schema).validate_python(value, strict=True)
    except ValidationError as error:
        raise FileError(path, _first_complaint(error)) from None
    return checked


def parse_json(path: Path | str, content: bytes, schema: type[T]) -> T:
    """The JSON value of the bytes. Types are strict, keys that the schema does not name are kept, depth is at most 200.

    Raises FileError, whose `problem` names the first key with a wrong type.
    """
    try:
        value: T = _adapter(schema).validate_json(content, strict=True)
    except ValidationError as error:
        raise FileError(path, _first_complaint(error)) from None
    return value


def read_json_lines(path: Path | str, schema: type[Any]) -> Iterator[Line]:
    """The lines of a file of JSON lines, blank ones too; a line that does not fit the schema has a `fault`. Ends at
    a line that is too long, and yields only its beginning. Raises FileError if there is no such file."""
    with open_file(path) as file, reading(path):
        number = 0
        while raw := file.readline(LINE):
            number += 1
            if len(raw) == LINE and not raw.endswith(b"\n"):
                yield Line(number, raw[:100], None, f"longer than {LINE:,} bytes; the rest of the file is left out")
                return
            try:
                yield Line(number, raw, parse_json(path, raw, schema), "")
            except FileError as fault:
                yield Line(number, raw, None, fault.problem)


_adapters: dict[Any, TypeAdapter[Any]] = {}


def _adapter(schema: Any) -> TypeAdapter[Any]:
    if schema not in _adapters:
        _adapters[schema] = TypeAdapter(schema)
    return _adapters[schema]


def _first_complaint(error: ValidationError) -> str:
    """pydantic's first complaint as a short message."""
    detail = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(map(str, detail["loc"]))
    complaint = detail["msg"].replace("Input should be", "it should be").replace("Field required", "it is missing")
    if detail["type"] == "json_invalid":
        return f"not valid JSON: {complaint.removeprefix('Invalid JSON: ')}"
    if detail["type"] == "dict_type" and not where:
        return "not a JSON object"
    return f"damaged: `{where}`: {complaint}" if where else f"damaged: {complaint}"


def _not_a_file(kind: int) -> str:
    names = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a FIFO", stat.S_IFLNK: "a symbolic link"}
    return f"{names.get(kind, 'a device or socket')} stands where a file should"


def _reason(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return "is missing"
    if error.errno == errno.ENXIO:
        return _not_a_file(stat.S_IFSOCK)
    return f"cannot be read ({error.strerror})"
