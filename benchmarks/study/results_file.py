"""A file of finished runs, one JSON record a line, in the order in which they finished; it is committed.

Several processes may append. A run with a record is not repeated, so a damaged line stops the study instead of being
skipped.
"""

from __future__ import annotations

import fcntl
import json
import subprocess
from collections.abc import Callable, Mapping
from operator import itemgetter
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class DamagedRecordError(ValueError):
    """A line of a results file that is not a record of a run, or one of the same run as an earlier line."""


def read_records(file: Path, name_of: Callable[[Record], str] = itemgetter("name")) -> list[Record]:
    """The records of a file; none if there is no file. name_of: the name of a record's run.

    Raises DamagedRecordError, naming file and line, for a line that is no record, that has no line end, or that has the
    name of an earlier one.
    """
    records: dict[str, Record] = {}
    if not file.exists():
        return []
    for number, line in enumerate(file.read_text().splitlines(keepends=True), 1):
        try:
            record = json.loads(line)
            name = name_of(record)
        except (ValueError, LookupError, TypeError):
            name = ""
        if not name or not line.endswith("\n"):
            raise DamagedRecordError(
                f"{file}, line {number}: not a whole record; remove this line, and the run is repeated"
            )
        if name in records:
            raise DamagedRecordError(f"{file}, line {number}: a second record of {name}; remove one of the two lines")
        records[name] = record
    return list(records.values())


def append_record(file: Path, record: Mapping[str, Any]) -> None:
    """Append a record as one line, in one write."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab", buffering=0) as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        stream.write((json.dumps(record) + "\n").encode())


def read_commit() -> str:
    """The short name of the repository's present commit; "" outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
