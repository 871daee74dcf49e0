"""The samples of an evaluation, streamed to disk a batch at a time, so that one that was killed goes on.

One JSON object a line: first what the evaluation is, then a line a response. Touches the one file it is given.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import with_config
from typing_extensions import TypedDict

from nemo_disco.runtime.files import open_regular, writing
from nemo_disco.runtime.saved_files import Count, FileError, parse_json


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


class SampleFile:
    """Samples in batches of known sizes. `done`: the whole batches that an earlier life of this evaluation left."""

    def __init__(self, path: Path, identity: Mapping[str, Any], batches: Sequence[int]) -> None:
        """identity: what decides every sample, of JSON types. A file of another identity is begun anew, and what stands
        behind the last whole batch is cut off."""
        self._path = path
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(open_regular(path, os.O_RDWR | os.O_APPEND | os.O_CREAT), "a+b")  # noqa: SIM115 - see close
        self._file.seek(0)
        head = json.dumps(identity, sort_keys=True).encode() + b"\n"
        if self._file.readline() != head:
            self._file.truncate(0)
            self._file.write(head)
        self.done = self._read(batches, len(head))
        with writing(path):
            self._sync()

    def append(self, samples: Sequence[Sample]) -> None:
        """A batch; when it returns, it survives the death of this process."""
        lines = b"".join(json.dumps(s, ensure_ascii=False).encode("utf-8", "replace") + b"\n" for s in samples)
        with writing(self._path):
            self._file.write(lines)
            self._sync()

    def close(self) -> None:
        self._file.close()

    def _read(self, batches: Sequence[int], end: int) -> list[list[Sample]]:
        done: list[list[Sample]] = []
        self._file.seek(end)
        for size in batches:
            lines = [self._file.readline() for _ in range(size)]
            try:
                if not all(line.endswith(b"\n") for line in lines):
                    break
                done.append([parse_json(self._path, line, Sample) for line in lines])
            except FileError:
                break  # damaged: sampled again
            end += sum(map(len, lines))
        self._file.truncate(end)
        return done

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
