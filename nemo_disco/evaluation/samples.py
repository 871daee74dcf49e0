"""Files of an evaluation's graded samples, written as they come, so that an evaluation that was killed can resume.

One JSON object a line: first the evaluation's identity, then one line for each response. Touches the file that the
caller names and the per-rank files beside it.
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

REPLACED = "replaced"  # directory beside the file, for samples of an evaluation with another identity
log = logging.getLogger(__name__)


@with_config(extra="forbid")
class EvaluationSample(TypedDict):
    """A graded response to a question of an evaluation set. sample: its number, or "greedy"; length: tokens."""

    question_id: Count
    question: str
    answer: list[str]
    sample: Count | Literal["greedy"]
    response: str
    reward: float
    correct: bool
    length: Count
    truncated: bool


class _RankLine(TypedDict):
    """A line of a rank's file: a sample of the unfinished batch, and its evaluation, batch and row in the batch."""

    identity: str
    batch: Count
    row: Count
    sample: EvaluationSample


class SampleFile:
    """File of complete batches. `batches`: those that an earlier process of the same evaluation wrote."""

    def __init__(self, path: Path, identity: Mapping[str, Any], batch_sizes: Sequence[int]) -> None:
        """identity: all that decides the samples, of JSON types. Samples of an evaluation with another identity are
        moved below REPLACED, and bytes after the last complete batch are cut off; both are logged. Raises UserError."""
        self._path = path
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        head = json.dumps(identity, sort_keys=True).encode() + b"\n"
        if os.path.lexists(path):
            self._move_other_samples(head)
        self.batches, end = self._read(head, batch_sizes) if os.path.lexists(path) else ([], 0)
        self._file = AppendedFile(path)
        self._file.cut(end)
        if not end:
            self._file.write(head)
        if self.batches:
            log.info("%s: resuming with %d samples of an earlier process", path, sum(map(len, self.batches)))

    def append(self, samples: Sequence[EvaluationSample]) -> None:
        """Write a batch; it is on disk when this returns, so that it survives the death of the process."""
        self._file.write(b"".join(map(_line, samples)))

    def close(self) -> None:
        self._file.close()

    def _move_other_samples(self, head: bytes) -> None:
        """Move the files below REPLACED if they hold samples of another evaluation, which were expensive to make."""
        with open_file(self._path) as file, reading(self._path):
            old_head, first_sample = file.readline(LINE), file.readline(LINE)
        rank_files = [path for path in _rank_files(self._path) if path.lstat().st_size]
        if old_head == head or not (first_sample or rank_files):
            return
        name = self._path.name
        replaced = self._path.with_name(REPLACED)
        place = first_free(replaced / str(number) / name for number in itertools.count(1)).parent
        with writing(place):
            place.mkdir(parents=True, exist_ok=True)
            for path in (*rank_files, self._path):  # the file last: it holds the identity of all of them
                path.rename(place / path.name)
        differences = _differences(old_head, head)
        log.warning("%s is of another evaluation (%s): its samples are now in %s", self._path, differences, place)

    def _read(self, head: bytes, batch_sizes: Sequence[int]) -> tuple[list[list[EvaluationSample]], int]:
        """The complete batches, and where they end in the file, in bytes; 0 if the first line is not `head`."""
        batches: list[list[EvaluationSample]] = []
        with open_file(self._path) as file, reading(self._path):
            if file.readline(LINE) != head:
                return [], 0
            end = len(head)
            for size in batch_sizes:
                lines = [file.readline(LINE) for _ in range(size)]
                if not all(line.endswith(b"\n") for line in lines):
                    break
                try:
                    batches.append([parse_json(self._path, line, EvaluationSample) for line in lines])
                except FileError as fault:
                    log.warning(
                        "%s: a sample is %s; its batch and later ones are sampled anew", self._path, fault.problem
                    )
                    break
                end += sum(map(len, lines))
        return batches, end


class SampleStream:
    """Samples of one evaluation on all ranks: rank 0's SampleFile of complete batches, and beside it one file per rank
    with that rank's samples of the unfinished batch. A context manager.

    batches: the complete batches; recovered: samples of the unfinished batch that an earlier process wrote, by row.
    Both are the same on every rank.
    """

    def __init__(
        self,
        path: Path,
        identity: Mapping[str, Any],
        batch_sizes: Sequence[int],
        rank: int = 0,
        broadcast: Callable[[Any], Any] = lambda value: value,
    ) -> None:
        """broadcast: returns rank 0's value on every rank. Raises UserError."""
        self._path = path
        self._rank_path = path.with_name(f"{path.stem}.rank_{rank}.jsonl")
        self._identity = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self._file = SampleFile(path, identity, batch_sizes) if rank == 0 else None
        self._rank_file: AppendedFile | None = None
        self.batches: list[list[EvaluationSample]] = self._file.batches if self._file else []
        self.recovered: dict[int, EvaluationSample] = self._recover() if self._file else {}
        # The identity is broadcast too: it holds the times of the weights' files, which may differ between machines.
        self.batches, self.recovered, self._identity = broadcast((self.batches, self.recovered, self._identity))

    def add(self, row: int, sample: EvaluationSample) -> None:
        """Write one sample of the unfinished batch; it is on disk when this returns."""
        self._rank_file = self._rank_file or AppendedFile(self._rank_path)
        self._rank_file.write(self._rank_line(row, sample))

    def append(self, samples: list[EvaluationSample]) -> None:
        """Write the batch that is now complete, and remove this rank's file of samples of it."""
        if self._file is not None:
            self._file.append(samples)
        self.batches.append(samples)
        self.recovered = {}
        if self._rank_file is not None:
            self._rank_file.close()
            self._rank_file = None
        with writing(self._rank_path):
            remove(self._rank_path)

    def __enter__(self) -> SampleStream:
        return self

    def __exit__(self, *_: object) -> None:
        for file in (self._file, self._rank_file):
            if file is not None:
                file.close()

    def _recover(self) -> dict[int, EvaluationSample]:
        """Gather the samples of the unfinished batch from the files of an earlier process's ranks, by row. They are in
        this rank's file before the others' are removed: a kill in between loses none."""
        samples: dict[int, EvaluationSample] = {}
        rank_files = _rank_files(self._path)
        for path in rank_files:
            with contextlib.suppress(FileError):
                for line in read_json_lines(path, _RankLine):
                    entry = None if line.fault else line.value
                    if entry and (entry["identity"], entry["batch"]) == (self._identity, len(self.batches)):
                        samples[entry["row"]] = entry["sample"]
        if samples:
            with atomic_file(self._rank_path) as work:
                work.write_bytes(b"".join(self._rank_line(row, sample) for row, sample in samples.items()))
            log.info("%s: resuming with %d samples of an unfinished batch", self._path, len(samples))
        for path in rank_files:
            if not samples or path != self._rank_path:
                with writing(path):
                    remove(path)
        return samples

    def _rank_line(self, row: int, sample: EvaluationSample) -> bytes:
        return _line({"identity": self._identity, "batch": len(self.batches), "row": row, "sample": sample})


def _rank_files(path: Path) -> list[Path]:
    """The per-rank files of unfinished batches beside a file of samples."""
    return sorted(path.parent.glob(f"{glob.escape(path.stem)}.rank_*.jsonl"))


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def _differences(old_head: bytes, new_head: bytes) -> str:
    """The keys in which two identities differ, for a message."""
    try:
        old, new = (parse_json("", head, dict[str, Any]) for head in (old_head, new_head))
    except FileError:
        return "its first line is damaged"
    return ", ".join(sorted(key for key in {**old, **new} if old.get(key) != new.get(key))) + " changed"
