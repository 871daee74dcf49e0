"""The record in a model directory that a run wrote (export/, best/): the training step of its weights.

A run that resumes at an earlier step tells by it which directories are of its own past. Reads one file.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import NotRequired

from typing_extensions import TypedDict

from nemo_disco.runtime.saved_files import Count, FileError, read_json

NAME = "nemo_disco.json"


class ModelRecord(TypedDict):
    """step: of training. best/ also has score, its mean Pass@1, and of, a hash of the sets of that score."""

    step: Count
    score: NotRequired[float]
    of: NotRequired[str]


def as_files(record: ModelRecord) -> dict[str, str]:
    """The record as files of the directory: name -> text."""
    return {NAME: json.dumps(record) + "\n"}


def read_record(directory: Path) -> ModelRecord | None:
    """The record of a directory; None if there is no such directory, or no readable record in it."""
    with contextlib.suppress(FileError):
        return read_json(directory / NAME, ModelRecord)
    return None
