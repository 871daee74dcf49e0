"""Reading of files as records (plain dicts): JSON, JSONL, Parquet, and directories saved by Hugging Face `datasets`.

Deals with file formats only; question_fields.py interprets the records. Nothing in a file is executed: nothing is
unpickled, and columns of bytes or extension types are refused.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nemo_disco.runtime.errors import UserError, one_line
from nemo_disco.runtime.saved_files import check_file, open_file, read_bytes, reading

if TYPE_CHECKING:
    import pyarrow as pa


class Record(NamedTuple):
    """A record of a file. place: "line 3" or "record 3", counted from 1. fault: of a malformed one, without fields."""

    place: str
    fields: dict[str, Any]
    fault: UserError | None = None


def read_records(path: Path) -> list[Record]:
    """Every record of a file, in order. Raises UserError, with the place, if it is missing, empty or malformed."""
    records = scan_records(path)
    for record in records:
        if record.fault is not None:
            raise record.fault
    return records


def scan_records(path: Path) -> list[Record]:
    """As `read_records`, but a malformed record does not raise: it is in the list, with its fault."""
    try:
        records = list(_iterate(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not records:
        raise UserError(f"{path}: the file holds no records; give one that does")
    return records


def read_lines(path: Path) -> Iterator[Record]:
    """Iterate over the records of a JSONL file; blank lines and a byte order mark are skipped.

    Raises UserError if the file cannot be read.
    """
    with open_file(path, links=True) as file, reading(path):
        for number, line in enumerate(file, 1):
            if line.removeprefix(codecs.BOM_UTF8).strip():
                place = f"line {number}"
                try:
                    yield _record(path, place, _decode(path, line, place=place))
                except UserError as error:
                    yield Record(place, {}, error)


def _iterate(path: Path) -> Iterator[Record]:
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
    raise UserError(f"{path}: not a question file; give .json, .jsonl, .parquet or a directory saved by `datasets`")


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
        raise UserError(f"{path}: the top level is {kind_of(data)}, not a list of records{hint}")
    yield from (_record(path, f"record {number}", value) for number, value in enumerate(data, 1))


def _decode(path: Path, content: bytes, place: str = "", hint: str = "") -> Any:
    try:
        return json.loads(content.decode("utf-8-sig"), object_pairs_hook=_unique_names)
    except json.JSONDecodeError as error:
        where = f"{place or f'line {error.lineno}'}, column {error.colno}"
        raise UserError(f"{path}, {where}: not valid JSON: {error.msg}{hint}") from error
    except UnicodeDecodeError as error:
        where = place or f"line {content[: error.start].count(10) + 1}"
        raise UserError(f"{path}, {where}: not UTF-8 text: byte 0x{content[error.start]:02x}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}{place and f', {place}'}: not usable JSON: {error}") from error


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dict. Raises ValueError if a name occurs twice."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has two values of {twice!r:.80}")
    return fields


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow.parquet as pq

    check_file(path, links=True)
    with _arrow_faults(path, "Parquet"), pq.ParquetFile(path) as file:
        _check_columns(path, file.schema_arrow)
        rows = _rows(path, file.read())
    yield from rows


@contextmanager
def _arrow_faults(path: Path, kind: str) -> Iterator[None]:
    """Turn pyarrow's exceptions about a damaged file into a UserError of one line."""
    import pyarrow as pa

    try:
        yield
    except UserError:
        raise
    except (pa.ArrowException, ValueError, OverflowError, TypeError, KeyError) as error:
        raise UserError(f"{path}: not a readable {kind} file: {one_line(error, 200)}") from error


def _rows(path: Path, table: pa.Table, begin: int = 0) -> list[Record]:
    """The rows of a table as records; begin: number of rows before the first. Only the rows with a value that Python
    cannot hold (text that is not UTF-8, a date after the year 9999) are malformed: found by halving the table."""
    import pyarrow as pa

    try:
        rows = table.to_pylist()
        if any(pa.types.is_nested(kind) for kind in table.schema.types):
            rows = [{name: _without_nulls(value) for name, value in row.items()} for row in rows]
        return [_record(path, f"record {number}", row) for number, row in enumerate(rows, begin + 1)]
    except (ValueError, OverflowError) as error:  # UnicodeDecodeError and ArrowInvalid are ValueErrors
        if table.num_rows == 1:
            place = f"record {begin + 1}"
            fault = UserError(f"{path}, {place}: `{_unreadable_column(table)}` cannot be read: {one_line(error, 200)}")
            return [Record(place, {}, fault)]
    half = table.num_rows // 2
    return _rows(path, table.slice(0, half), begin) + _rows(path, table.slice(half), begin + half)


def _without_nulls(value: Any) -> Any:
    """The value without null fields of nested objects: a table gives each row the fields of all rows."""
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _unreadable_column(row: pa.Table) -> str:
    """Name of the column that cannot be read in a table of one row."""
    for name, column in zip(row.column_names, row.columns, strict=True):
        try:
            column.to_pylist()
        except (ValueError, OverflowError):
            return str(name)
    return "?"


def _saved_dataset(path: Path) -> Iterator[Record]:
    """The records that `Dataset.save_to_disk` wrote; its state.json names the Arrow streams, in order."""
    import pyarrow as pa

    splits = path / "dataset_dict.json"
    if splits.exists():
        names = _decode(splits, read_bytes(splits, links=True)).get("splits", [])
        raise UserError(f"{path}: holds several splits; name one: {', '.join(str(path / name) for name in names)}")
    state = path / "state.json"
    if not state.exists():
        raise UserError(f"{path}: a directory, but not one saved by `datasets` (no state.json in it)")
    try:
        entries = _decode(state, read_bytes(state, links=True))["_data_files"]
        shards = [path / Path(entry["filename"]).name for entry in entries]
    except (KeyError, TypeError) as error:
        raise UserError(f"{state}: no list `_data_files` of objects with a `filename`") from error
    rows: list[Record] = []
    for shard in shards:
        check_file(shard, links=True)
        with _arrow_faults(shard, "Arrow"), pa.memory_map(str(shard)) as source, pa.ipc.open_stream(source) as stream:
            _check_columns(shard, stream.schema)
            rows += _rows(path, stream.read_all(), len(rows))
    yield from rows


def _check_columns(path: Path, schema: pa.Schema) -> None:
    """Raise UserError for two columns of one name, and for columns that hold bytes or extension types."""
    for field in schema:
        if schema.names.count(field.name) > 1:
            raise UserError(f"{path}: two columns are named `{field.name}`; leave one out")
        for kind in map(str, _leaf_types(field.type)):
            if "binary" in kind or "extension" in kind:
                raise UserError(f"{path}: column `{field.name}` holds {kind}, which is never read; leave it out")


def _leaf_types(kind: pa.DataType) -> Iterator[pa.DataType]:
    if kind.num_fields == 0:
        yield kind
    for child in range(kind.num_fields):
        yield from _leaf_types(kind.field(child).type)


def _record(path: Path, place: str, value: Any) -> Record:
    if isinstance(value, dict):
        return Record(place, value)
    return Record(place, {}, UserError(f"{path}, {place}: {kind_of(value)}, not an object with fields"))


def kind_of(value: Any) -> str:
    """The name of a JSON value's type, for a message."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
