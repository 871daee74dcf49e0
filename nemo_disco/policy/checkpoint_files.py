"""A checkpoint as files: its record in plain JSON, checksums, appearing whole or not at all, rotation.

Knows nothing of what the files hold and opens none of them but to hash it. One rank writes; any may hash.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nemo_disco.runtime.files import put_in_place

RECORD = "checkpoint.json"
FORMAT = 1

_FINISHED = re.compile(r"step_(\d+)(?:\.replaced)?")
_UNFINISHED = re.compile(r"step_\d+\.tmp-.*")


class DamagedError(Exception):
    """What is wrong with a checkpoint, and with which of its files."""


def finished(directory: Path) -> dict[int, Path]:
    """Every checkpoint that was written to its end, by step, oldest first."""
    found: dict[int, Path] = {}
    if directory.is_dir():
        for path in sorted(directory.iterdir()):  # step_N comes before step_N.replaced
            if (match := _FINISHED.fullmatch(path.name)) and path.is_dir():
                found.setdefault(int(match[1]), path)
    return dict(sorted(found.items()))


def clean(directory: Path) -> None:
    """Remove what killed processes left: half-written checkpoints, and those whose replacement is there."""
    for path in directory.glob("step_*.*"):
        replaced = path.name.endswith(".replaced") and path.with_suffix("").exists()
        if replaced or _UNFINISHED.fullmatch(path.name):
            shutil.rmtree(path)


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
        shutil.rmtree(gone)


def describe(work: Path, rank: int) -> dict[str, dict[str, Any]]:
    """Size and checksum of the files that this rank wrote (rank 0: and of those that belong to all)."""
    mine = f"__{rank}_"
    names = [p.name for p in work.iterdir() if p.name.startswith(mine) or (rank == 0 and not p.name.startswith("__"))]
    return {name: {"bytes": (work / name).stat().st_size, "sha256": _hash(work / name)} for name in sorted(names)}


def read_record(path: Path) -> dict[str, Any]:
    """The checkpoint.json of a checkpoint. Raises DamagedError."""
    file = path / RECORD
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DamagedError(f"{RECORD} is missing") from None
    except (OSError, ValueError) as error:
        raise DamagedError(f"{RECORD} cannot be read ({error})") from None
    if not isinstance(record, dict) or record.get("sha256") != _digest(record):
        raise DamagedError(f"{RECORD} was altered (its checksum does not match)")
    return record


def check(path: Path, files: Mapping[str, Any], names: Iterable[str]) -> None:
    """Compare the named files with what the record says of them. Raises DamagedError naming the first that differs."""
    for name in names:
        said = files[name]
        try:
            size, checksum = (path / name).stat().st_size, _hash(path / name)
        except FileNotFoundError:
            raise DamagedError(f"{name} is missing") from None
        except OSError as error:
            raise DamagedError(f"{name} cannot be read ({error})") from None
        if size != said["bytes"]:
            raise DamagedError(f"{name} has {size} bytes, {said['bytes']} were written")
        if checksum != said["sha256"]:
            raise DamagedError(f"{name} was altered (its checksum does not match)")


def _hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _digest(record: Mapping[str, Any]) -> str:
    """Of what the record says, whatever its spelling."""
    said = {key: value for key, value in record.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
