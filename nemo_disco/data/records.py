"""Question files as plain records: JSON, JSONL, Parquet, and directories saved by Hugging Face `datasets`.

Knows file formats and nothing of questions. Nothing from a file is executed: no unpickling, and columns that hold
bytes or extension types are refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nemo_disco.runtime.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa


class Record(NamedTuple):
    """place: "line 3" or "record 3", counted from 1."""

    place: str
    fields: dict[str, Any]


def read_records(path: Path) -> list[Record]:
    """Every record of a file, in order. Raises UserError: missing, unreadable, empty or malformed, and where."""
    try:
        records = list(_reader(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not records:
        raise UserError(f"{path}: there are no questions in it: the file is empty")
    return records


def _reader(path: Path) -> Iterator[Record]:
    if path.is_dir():
        return _saved_dataset(path)
    if not path.exists():
        raise UserError(f"{path}: there is no such question file")
    suffix = path.suffix.lower()
    if suffix == ".json":
        return _json(path)
    if suffix == ".jsonl":
        return _jsonl(path)
    if suffix == ".parquet":
        return _parquet(path)
    raise UserError(f"{path}: not a kind of question file; there are .json, .jsonl, .parquet and saved `datasets`")


def _json(path: Path) -> Iterator[Record]:
    content = path.read_bytes()
    if not content.strip():
        return
    hint = "; if it holds one record a line, name it .jsonl" if b"\n{" in content else ""
    data = _decode(path, content, hint=hint)
    if not isinstance(data, list):
        raise UserError(f"{path}: the top level is {_kind(data)}, not a list of records{hint}")
    yield from _numbered(path, data)


def _jsonl(path: Path) -> Iterator[Record]:
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if line.strip():
            value = _decode(path, line, place=f"line {number}")
            yield _record(path, f"line {number}", value)


def _decode(path: Path, content: bytes, place: str = "", hint: str = "") -> Any:
    try:
        return json.loads(content.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        where = f"{place or f'line {error.lineno}'}, column {error.colno}"
        raise UserError(f"{path}, {where}: not valid JSON: {error.msg}{hint}") from error
    except UnicodeDecodeError as error:
        where = place or f"line {content[: error.start].count(10) + 1}"
        raise UserError(f"{path}, {where}: not UTF-8 text: byte 0x{content[error.start]:02x}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}{place and f', {place}'}: not usable JSON: {error}") from error


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            _refuse_objects(path, file.schema_arrow)
            rows = file.read().to_pylist()
    except pa.ArrowException as error:
        raise UserError(f"{path}: not a readable Parquet file: {_first_line(error)}") from error
    yield from _numbered(path, rows)


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
    rows: list[Any] = []
    for shard in shards:
        try:
            with pa.memory_map(str(shard)) as source, pa.ipc.open_stream(source) as stream:
                _refuse_objects(shard, stream.schema)
                rows += stream.read_all().to_pylist()
        except pa.ArrowException as error:
            raise UserError(f"{shard}: not a readable Arrow file: {_first_line(error)}") from error
    yield from _numbered(path, rows)


def _refuse_objects(path: Path, schema: pa.Schema) -> None:
    for field in schema:
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
        yield _record(path, f"record {number}", value)


def _record(path: Path, place: str, value: Any) -> Record:
    if not isinstance(value, dict):
        raise UserError(f"{path}, {place}: {_kind(value)}, not an object with fields")
    return Record(place, value)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
