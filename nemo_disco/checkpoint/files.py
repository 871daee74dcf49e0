"""A checkpoint as files: its record in plain JSON, checksums, appearing whole or not at all, rotation.

Knows nothing of what the files hold and opens none of them but to hash it. One rank writes; any may hash.
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
from nemo_disco.runtime.saved_files import Count, FileError, open_file, parse_json, read_bytes

RECORD = "checkpoint.json"
FORMAT = 1

_FINISHED = re.compile(r"step_(\d+)(?:\.replaced)?")
_UNFINISHED = re.compile(r"step_\d+\.tmp-.*")


class DamagedError(Exception):
    """What is wrong with a checkpoint, and with which of its files."""


class FileEntry(TypedDict):
    """One file of a checkpoint."""

    bytes: Count
    sha256: str


class OptimizerEntry(TypedDict):
    """steps: how many optimizer steps were taken."""

    name: str
    steps: Count


@with_config(extra="allow")
class Record(TypedDict):
    """checkpoint.json: what is relied on of it; it may hold more."""

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


def finished(directory: Path) -> dict[int, Path]:
    """Every checkpoint that was written to its end, by step, oldest first."""
    found: dict[int, Path] = {}
    if directory.is_dir():
        for path in sorted(directory.iterdir()):  # step_N comes before step_N.replaced
            if (match := _FINISHED.fullmatch(path.name)) and path.is_dir():  # a file of that name is none
                found.setdefault(int(match[1]), path)
    return dict(sorted(found.items()))


def clean(directory: Path) -> None:
    """Remove what killed processes left: half-written checkpoints, and those whose replacement is there."""
    for path in directory.glob("step_*.*"):
        replaced = path.name.endswith(".replaced") and path.with_suffix("").exists()
        if replaced or _UNFINISHED.fullmatch(path.name):
            remove(path)


def begin(directory: Path, step: int) -> Path:
    """A new, empty directory to write the checkpoint of a step into."""
    directory.mkdir(parents=True, exist_ok=True)
    clean(directory)
    # A name that no straggler of a killed run knows.
    work = directory / f"step_{step}.tmp-{secrets.token_hex(4)}"
    work.mkdir()
    return work


def commit(work: Path, final: Path, record: Mapping[str, Any]) -> None:
    """Put the record into `work`, sync it, and let it appear as `final`, in place of what was there."""
    write_record(work, record)
    put_in_place(work, final)  # what it leaves where it is killed, `finished` and `clean` know
    clean(final.parent)


def write_record(work: Path, record: Mapping[str, Any]) -> None:
    """Write checkpoint.json, with a checksum of what it says."""
    text = json.dumps({**record, "sha256": _digest(record)}, indent=1)
    (work / RECORD).write_text(text, encoding="utf-8")


def rotate(directory: Path, step: int, keep: int) -> None:
    """Keep the `keep` newest up to `step`, the one just written. Later ones are of a future that this run has left
    (their checkpoint was damaged, or an earlier one was asked for): resuming must not find them."""
    found = finished(directory)
    kept = [s for s in found if s <= step][-keep:]
    for old in found.keys() - kept:
        # Renamed first, so that half of it never looks like a checkpoint.
        gone = directory / f"step_{old}.tmp-{secrets.token_hex(4)}"
        found[old].rename(gone)
        remove(gone)


def describe(work: Path, rank: int) -> dict[str, dict[str, Any]]:
    """Size and checksum of the files that this rank wrote (rank 0: and of those that belong to all)."""
    mine = f"__{rank}_"
    names = [p.name for p in work.iterdir() if p.name.startswith(mine) or (rank == 0 and not p.name.startswith("__"))]
    return {name: {"bytes": (work / name).stat().st_size, "sha256": _hash(work / name)} for name in sorted(names)}


def read_record(path: Path) -> dict[str, Any]:
    """The checkpoint.json of a checkpoint. Raises DamagedError."""
    file = path / RECORD
    try:
        content = read_bytes(file)
        record = parse_json(file, content, dict[str, Any])
        if record.get("sha256") != _digest(record):
            raise DamagedError(f"{RECORD} was altered (its checksum does not match)")
        return cast(dict[str, Any], parse_json(file, content, Record))
    except FileError as fault:
        raise DamagedError(f"{RECORD} {fault.problem}") from None


def check(path: Path, files: Mapping[str, Any], names: Iterable[str]) -> None:
    """Compare the named files with what the record says of them. Raises DamagedError naming the first that differs."""
    for name in names:
        said = files[name]
        try:
            with open_file(path / name) as stream:
                size = os.fstat(stream.fileno()).st_size
                if size != said["bytes"]:  # before it is read: it may be endless
                    raise DamagedError(f"{name} has {size} bytes, {said['bytes']} were written")
                checksum = hashlib.file_digest(stream, "sha256").hexdigest()
        except FileError as fault:
            raise DamagedError(f"{name} {fault.problem}") from None
        except OSError as error:
            raise DamagedError(f"{name} cannot be read ({error})") from None
        if checksum != said["sha256"]:
            raise DamagedError(f"{name} was altered (its checksum does not match)")


def _hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _digest(record: Mapping[str, Any]) -> str:
    """Of what the record says, whatever its spelling."""
    said = {key: value for key, value in record.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
