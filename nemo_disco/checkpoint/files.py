"""The files of a checkpoint: its record in plain JSON, their checksums, atomic replacement and rotation.

Opens the other files only to hash them. One rank writes; every rank may hash.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, cast

from pydantic import Field, with_config
from typing_extensions import TypedDict

from nemo_disco.runtime.files import put_in_place, remove
from nemo_disco.runtime.saved_files import Count, FileError, open_file, parse_json, read_bytes, reading

RECORD = "checkpoint.json"
FORMAT = 1

_COMPLETE = re.compile(r"step_(\d+)(?:\.replaced)?")
_INCOMPLETE = re.compile(r"step_\d+\.tmp-.*")


class DamagedError(Exception):
    """A checkpoint is damaged. The message names the file and the problem."""


class FileEntry(TypedDict):
    """Size and checksum of one file."""

    bytes: Count
    sha256: str


class OptimizerEntry(TypedDict):
    """Name of the optimizer, and the number of steps that it has applied."""

    name: str
    steps: Count


@with_config(extra="allow")
class CheckpointRecord(TypedDict):
    """The fields of checkpoint.json that loading relies on; others may stand beside them."""

    format: Count
    step: Count
    code: dict[str, str]
    dtype: str
    optimizer: OptimizerEntry | None
    model: dict[str, Any]
    loop_state: dict[str, Any]
    random_state: list[dict[str, str]]
    files: dict[Annotated[str, Field(pattern=r"^[^/\x00]+$")], FileEntry]
    sha256: str


def list_checkpoints(directory: Path) -> dict[int, Path]:
    """The complete checkpoints of a directory by step, oldest first."""
    paths: dict[int, Path] = {}
    for path in sorted(directory.iterdir()) if directory.is_dir() else ():  # step_N comes before step_N.replaced
        if (match := _COMPLETE.fullmatch(path.name)) and path.is_dir():  # a file with such a name is no checkpoint
            paths.setdefault(int(match[1]), path)
    return dict(sorted(paths.items()))


def clean(directory: Path) -> None:
    """Remove the leftovers of killed processes: incomplete checkpoints, and those that have been replaced."""
    for path in directory.glob("step_*.*"):
        replaced = path.name.endswith(".replaced") and path.with_suffix("").exists()
        if replaced or _INCOMPLETE.fullmatch(path.name):
            remove(path)


def begin(directory: Path, step: int) -> Path:
    """Make a new, empty directory to write the checkpoint of a step into, and return it."""
    directory.mkdir(parents=True, exist_ok=True)
    clean(directory)
    work = _temporary(directory, step)
    work.mkdir()
    return work


def commit(work: Path, final: Path, record: Mapping[str, Any]) -> None:
    """Write the record into `work`, sync all of it, and rename it to `final`, replacing a checkpoint there."""
    write_record(work, record)
    put_in_place(work, final)  # a kill leaves names that `list_checkpoints` and `clean` recognise
    clean(final.parent)


def write_record(work: Path, record: Mapping[str, Any]) -> None:
    """Write checkpoint.json: the record and a checksum of its content."""
    text = json.dumps({**record, "sha256": _digest(record)}, indent=1)
    (work / RECORD).write_text(text, encoding="utf-8")


def rotate(directory: Path, step: int, keep: int) -> None:
    """Keep the `keep` newest checkpoints up to `step`, which was just written; remove all others. Later steps belong to
    a run that this one does not continue (their checkpoint was damaged, or an earlier one was chosen to go on from)."""
    paths = list_checkpoints(directory)
    for old in paths.keys() - [s for s in paths if s <= step][-keep:]:
        work = _temporary(directory, old)  # a half removed directory must not look like a checkpoint
        paths[old].rename(work)
        remove(work)


def _temporary(directory: Path, step: int) -> Path:
    """A path that no other process uses, and that no killed run left over."""
    return directory / f"step_{step}.tmp-{secrets.token_hex(4)}"


def describe(work: Path, rank: int) -> dict[str, dict[str, Any]]:
    """Size and checksum of the files that this rank wrote; on rank 0 also of the files that belong to no rank."""
    own = f"__{rank}_"
    names = [p.name for p in work.iterdir() if p.name.startswith(own) or (rank == 0 and not p.name.startswith("__"))]
    return {name: {"bytes": (work / name).stat().st_size, "sha256": _hash(work / name)} for name in sorted(names)}


def read_record(path: Path) -> dict[str, Any]:
    """Read checkpoint.json of the checkpoint at `path`. Raises DamagedError."""
    file = path / RECORD
    try:
        content = read_bytes(file)
        record = parse_json(file, content, dict[str, Any])
        if record.get("sha256") != _digest(record):
            raise DamagedError(f"{RECORD} was altered (its checksum does not match)")
        return cast(dict[str, Any], parse_json(file, content, CheckpointRecord))
    except FileError as fault:
        raise DamagedError(f"{RECORD} {fault.problem}") from None


def check(path: Path, files: Mapping[str, Any], names: Iterable[str]) -> None:
    """Compare files with their size and checksum in the record. Raises DamagedError naming the first that differs."""
    for name in names:
        expected = files[name]
        try:
            with open_file(path / name) as stream, reading(path / name):
                size = os.fstat(stream.fileno()).st_size
                if size != expected["bytes"]:  # before it is read: it may be endless
                    raise DamagedError(f"{name} has {size} bytes, {expected['bytes']} were written")
                checksum = hashlib.file_digest(stream, "sha256").hexdigest()
        except FileError as fault:
            raise DamagedError(f"{name} {fault.problem}") from None
        if checksum != expected["sha256"]:
            raise DamagedError(f"{name} was altered (its checksum does not match)")


def _hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _digest(record: Mapping[str, Any]) -> str:
    """Checksum of the record's content, whatever the order of its keys and its white space in the file."""
    content = {key: value for key, value in record.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
