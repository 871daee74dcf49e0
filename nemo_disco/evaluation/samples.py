"""The samples of an evaluation, streamed to disk as they come, so that one that was killed goes on.

One JSON object a line: first what the evaluation is, then a line a response. Touches the file it is given, and
those of the ranks beside it.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import itertools
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import with_config
from typing_extensions import TypedDict

from nemo_disco.runtime.files import AppendedFile, atomic_file, first_free, remove, writing
from nemo_disco.runtime.saved_files import LINE, Count, FileError, open_file, parse_json, read_json_lines, reading

REPLACED = "replaced"  # the directory beside it that takes another evaluation's samples
log = logging.getLogger(__name__)


@with_config(extra="forbid")
class Sample(TypedDict):
    """One response to a question of a set, graded. sample: its number, or "greedy"; length: tokens."""

    question_id: Count
    question: str
    answer: list[str]
    sample: Count | Literal["greedy"]
    response: str
    reward: float
    correct: bool
    length: Count
    truncated: bool


class _Part(TypedDict):
    """A line of what a rank had of a batch: of which evaluation, batch and row it is."""

    identity: str
    batch: Count
    row: Count
    sample: Sample


class SampleFile:
    """Samples in batches of known sizes. `done`: the whole batches that an earlier life of this evaluation left."""

    def __init__(self, path: Path, identity: Mapping[str, Any], batches: Sequence[int]) -> None:
        """identity: what decides every sample, of JSON types. What another evaluation left is moved to a place of its
        own, and what stands behind the last whole batch is cut off; both are said. Raises UserError."""
        self._path = path
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        head = json.dumps(identity, sort_keys=True).encode() + b"\n"
        if os.path.lexists(path):
            self._set_aside(head)
        self.done, end = self._read(head, batches) if os.path.lexists(path) else ([], 0)
        self._file = AppendedFile(path)
        self._file.cut(end)
        if not end:
            self._file.write(head)
        if self.done:
            log.info("%s: %d samples of an earlier life of this evaluation are used", path, sum(map(len, self.done)))

    def append(self, samples: Sequence[Sample]) -> None:
        """A batch; when it returns, it survives the death of this process."""
        self._file.write(b"".join(map(_line, samples)))

    def close(self) -> None:
        self._file.close()

    def _set_aside(self, head: bytes) -> None:
        """Another evaluation's samples took long: they are kept where they say nothing of this one."""
        with open_file(self._path) as file, reading(self._path):
            theirs, more = file.readline(LINE), file.readline(LINE)
        parts = [path for path in _parts(self._path) if path.lstat().st_size]
        if theirs == head or not (more or parts):
            return
        name = self._path.name
        replaced = self._path.with_name(REPLACED)
        place = first_free(replaced / str(number) / name for number in itertools.count(1)).parent
        with writing(place):
            place.mkdir(parents=True, exist_ok=True)
            for path in (*parts, self._path):  # its first line says what they are, so it goes last
                path.rename(place / path.name)
        differences = _differences(theirs, head)
        log.warning("%s is of another evaluation (%s): its samples are now in %s", self._path, differences, place)

    def _read(self, head: bytes, batches: Sequence[int]) -> tuple[list[list[Sample]], int]:
        """The whole batches, and how many bytes they are with the first line; 0 if that is not `head`."""
        done: list[list[Sample]] = []
        with open_file(self._path) as file, reading(self._path):
            if file.readline(LINE) != head:
                return [], 0
            end = len(head)
            for size in batches:
                lines = [file.readline(LINE) for _ in range(size)]
                if not all(line.endswith(b"\n") for line in lines):
                    break
                try:
                    done.append([parse_json(self._path, line, Sample) for line in lines])
                except FileError as fault:
                    log.warning("%s: a sample is %s; it and what follows is sampled again", self._path, fault.what)
                    break
                end += sum(map(len, lines))
        return done, end


class SampleStream:
    """The samples of one evaluation: whole batches in one file, and beside it what each rank has of the batch in hand,
    a line a sample as it comes. `done`: the whole batches. A context; the same on every rank but for the files."""

    def __init__(
        self,
        path: Path | None,
        identity: Mapping[str, Any],
        batches: Sequence[int],
        rank: int = 0,
        share: Callable[[Any], Any] = lambda mine: mine,
    ) -> None:
        """path: None keeps nothing. share: gives every rank what rank 0 has. Raises UserError."""
        self._path = path
        self._part_path = path.with_name(f"{path.stem}.rank_{rank}.jsonl") if path else None
        self._identity = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self._file = SampleFile(path, identity, batches) if path and rank == 0 else None
        self._part: AppendedFile | None = None
        self.done: list[list[Sample]] = self._file.done if self._file else []
        self._known: dict[int, Sample] = self._left() if self._file else {}
        # The identity too: of the weights it has the times of their files, which may differ from machine to machine.
        self.done, self._known, self._identity = share((self.done, self._known, self._identity))

    def known(self) -> Mapping[int, Sample]:
        """The samples of the batch in hand that an earlier life left, by row."""
        return self._known

    def add(self, row: int, sample: Sample) -> None:
        """A sample of the batch in hand; when it returns, it survives the death of this process."""
        if self._part_path is None:
            return
        self._part = self._part or AppendedFile(self._part_path)
        self._part.write(self._entry(row, sample))

    def append(self, samples: list[Sample]) -> None:
        """The batch in hand, whole."""
        if self._file is not None:
            self._file.append(samples)
        self.done.append(samples)
        self._known = {}
        if self._part is not None:
            self._part.close()
            self._part = None
        if self._part_path is not None:
            with writing(self._part_path):
                remove(self._part_path)

    def all(self) -> list[Sample]:
        return [sample for batch in self.done for sample in batch]

    def __enter__(self) -> SampleStream:
        return self

    def __exit__(self, *_: object) -> None:
        for file in (self._file, self._part):
            if file is not None:
                file.close()

    def _left(self) -> dict[int, Sample]:
        """The samples of the unfinished batch that the ranks of an earlier life left, by row. They are in this rank's
        file before the others' are removed: a kill in between loses none."""
        assert self._path is not None and self._part_path is not None
        found: dict[int, Sample] = {}
        parts = _parts(self._path)
        for path in parts:
            with contextlib.suppress(FileError):
                for line in read_json_lines(path, _Part):
                    entry = None if line.fault else line.value
                    if entry and (entry["identity"], entry["batch"]) == (self._identity, len(self.done)):
                        found[entry["row"]] = entry["sample"]
        if found:
            with atomic_file(self._part_path) as work:
                work.write_bytes(b"".join(self._entry(row, sample) for row, sample in found.items()))
            log.info("%s: %d samples of a batch that was not finished are used", self._path, len(found))
        for path in parts:
            if not found or path != self._part_path:
                with writing(path):
                    remove(path)
        return found

    def _entry(self, row: int, sample: Sample) -> bytes:
        """A line of a rank's file."""
        return _line({"identity": self._identity, "batch": len(self.done), "row": row, "sample": sample})


def _parts(path: Path) -> list[Path]:
    """The files beside the samples' file in which the ranks keep their samples of the unfinished batch."""
    return sorted(path.parent.glob(f"{glob.escape(path.stem)}.rank_*.jsonl"))


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def _differences(theirs: bytes, ours: bytes) -> str:
    """The keys in which two identities differ, as the end of a message."""
    try:
        old, new = (parse_json("", head, dict[str, Any]) for head in (theirs, ours))
    except FileError:
        return "its first line is damaged"
    return ", ".join(sorted(key for key in {**old, **new} if old.get(key) != new.get(key))) + " changed"
