"""Question files as plain records: JSON, JSONL, Parquet, and directories saved by Hugging Face `datasets`.

Knows file formats and nothing of questions. Nothing from a file is executed: no unpickling, and columns that hold
bytes or extension types are refused.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.saved_files import check_file, open_file, reading

if TYPE_CHECKING:
    import pyarrow as pa


class Record(NamedTuple):
    """place: "line 3" or "record 3", counted from 1. fault: why it has no fields, where it is malformed."""

    place: str
    fields: dict[str, Any]
    fault: UserError | None = None


def read_records(path: Path) -> list[Record]:
    """Every record of a file, in order. Raises UserError: missing, unreadable, empty or malformed, and where."""
    records = scan_records(path)
    for record in records:
        if record.fault is not None:
            raise record.fault
    return records


def scan_records(path: Path) -> list[Record]:
    """As `read_records`, but where one record alone is malformed, it is in the list with its fault."""
    try:
        records = list(_reader(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not records:
        raise UserError(f"{path}: there are no questions in it: the file is empty")
    return records


def read_lines(path: Path) -> Iterator[Record]:
    """The records of a JSONL file, one after another: blank lines are none, a byte order mark may begin it.

    Raises UserError where it cannot be read.
    """
    with open_file(path, links=True) as file, reading(path):
        for number, line in enumerate(file, 1):
            if line.removeprefix(codecs.BOM_UTF8).strip():
                place = f"line {number}"
                try:
                    yield _record(path, place, _decode(path, line, place=place))
                except UserError as error:
                    yield Record(place, {}, error)


def _reader(path: Path) -> Iterator[Record]:
    if path.is_dir():
        return _saved_dataset(path)
    if not path.exists():
        raise UserError(f"{path}: there is no such question file")
    suffix = path.suffix.lower()
    if suffix == ".json":
        return _json(path)
    if suffix == ".jsonl":
        return read_lines(path)
    if suffix == ".parquet":
        return _parquet(path)
    raise UserError(f"{path}: not a kind of question file; there are .json, .jsonl, .parquet and saved `datasets`")


def _json(path: Path) -> Iterator[Record]:
    with open_file(path, links=True) as file:
        content = file.read()
    if not content.strip():
        return
    hint = "; if it holds one record a line, name it .jsonl" if b"\n{" in content else ""
    data = _decode(path, content, hint=hint)
    if isinstance(data, dict) and any(isinstance(column, list) for column in data.values()) and "data" not in data:
        data = [data]  # a table, column by column
    if not isinstance(data, list):
        raise UserError(f"{path}: the top level is {_kind(data)}, not a list of records{hint}")
    yield from _numbered(path, data)


def _decode(path: Path, content: bytes, place: str = "", hint: str = "") -> Any:
    try:
        return json.loads(content.decode("utf-8-sig"), object_pairs_hook=_unambiguous)
    except json.JSONDecodeError as error:
        where = f"{place or f'line {error.lineno}'}, column {error.colno}"
        raise UserError(f"{path}, {where}: not valid JSON: {error.msg}{hint}") from error
    except UnicodeDecodeError as error:
        where = place or f"line {content[: error.start].count(10) + 1}"
        raise UserError(f"{path}, {where}: not UTF-8 text: byte 0x{content[error.start]:02x}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}{place and f', {place}'}: not usable JSON: {error}") from error


def _unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. Raises ValueError where it has two values of one name."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has two values of {twice!r:.80}")
    return made


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow.parquet as pq

    check_file(path, links=True)
    with _arrow(path, "Parquet"), pq.ParquetFile(path) as file:
        _refuse_objects(path, file.schema_arrow)
        rows = _rows(path, file.read())
    yield from rows


@contextmanager
def _arrow(path: Path, kind: str) -> Iterator[None]:
    """Turns what pyarrow raises of a damaged file into one line."""
    import pyarrow as pa

    try:
        yield
    except UserError:
        raise
    except (pa.ArrowException, ValueError, OverflowError, TypeError, KeyError) as error:
        raise UserError(f"{path}: not a readable {kind} file: {_first_line(error)}") from error


def _rows(path: Path, table: pa.Table, begin: int = 0) -> list[Record]:
    """The rows of a table. One with a value that Python cannot hold (text that is not UTF-8, a date beyond the year
    9999) is malformed alone. begin: rows before these."""
    import pyarrow as pa

    try:
        rows = table.to_pylist()
        if any(pa.types.is_nested(kind) for kind in table.schema.types):
            rows = [{name: _without_nulls(value) for name, value in row.items()} for row in rows]
        return [_record(path, f"record {number}", row) for number, row in enumerate(rows, begin + 1)]
    except (ValueError, OverflowError) as error:  # UnicodeDecodeError and ArrowInvalid are ValueErrors
        if table.num_rows == 1:
            place = f"record {begin + 1}"
            fault = UserError(f"{path}, {place}: `{_culprit(table)}` cannot be read: {_first_line(error)}")
            return [Record(place, {}, fault)]
    half = table.num_rows // 2
    return _rows(path, table.slice(0, half), begin) + _rows(path, table.slice(half), begin + half)


def _without_nulls(value: Any) -> Any:
    """Without the names of nested objects that have no value: a table has all names of all rows in each of them."""
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _culprit(row: pa.Table) -> str:
    """The column of one row that cannot be read."""
    for name, column in zip(row.column_names, row.columns, strict=True):
        try:
            column.to_pylist()
        except (ValueError, OverflowError):
            return str(name)
    return "?"


def _saved_dataset(path: Path) -> Iterator[Record]:
    """What `Dataset.save_to_disk` wrote: state.json names the Arrow streams, in order."""
    import pyarrow as pa

    splits = path / "dataset_dict.json"
    if splits.exists():
        names = _decode(splits, splits.read_bytes()).get("splits", [])
        raise UserError(f"{path}: holds several splits; name one: {', '.join(str(path / name) for name in names)}")
    state = path / "state.json"
    if not state.exists():
        raise UserError(f"{path}: a directory, but not one saved by `datasets` (no state.json in it)")
    try:
        shards = [path / Path(entry["filename"]).name for entry in _decode(state, state.read_bytes())["_data_files"]]
    except (KeyError, TypeError) as error:
        raise UserError(f"{state}: no list `_data_files` of objects with a `filename`") from error
    rows: list[Record] = []
    for shard in shards:
        with _arrow(shard, "Arrow"), pa.memory_map(str(shard)) as source, pa.ipc.open_stream(source) as stream:
            _refuse_objects(shard, stream.schema)
            rows += _rows(path, stream.read_all(), len(rows))
    yield from rows


def _refuse_objects(path: Path, schema: pa.Schema) -> None:
    for field in schema:
        if schema.names.count(field.name) > 1:
            raise UserError(f"{path}: two columns are named `{field.name}`; leave one out")
        for kind in map(str, _leaves(field.type)):
            if "binary" in kind or "extension" in kind:
                raise UserError(f"{path}: column `{field.name}` holds {kind}, which is never read; leave it out")


def _leaves(kind: pa.DataType) -> Iterator[pa.DataType]:
    if kind.num_fields == 0:
        yield kind
    for child in range(kind.num_fields):
        yield from _leaves(kind.field(child).type)


def _numbered(path: Path, values: Iterable[Any]) -> Iterator[Record]:
    for number, value in enumerate(values, 1):
        try:
            yield _record(path, f"record {number}", value)
        except UserError as error:
            yield Record(f"record {number}", {}, error)


def _record(path: Path, place: str, value: Any) -> Record:
    if not isinstance(value, dict):
        raise UserError(f"{path}, {place}: {_kind(value)}, not an object with fields")
    return Record(place, value)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
