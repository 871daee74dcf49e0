"""What a model directory that a run wrote (export/, best/) says of itself: the training step that its weights are of.

So a life that begins at an earlier step knows what is of its own past. Reads and names one file.
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
    """step: of training. Of best/ also score, its mean Pass@1, and of, a hash of the sets that it was scored on."""

    step: Count
    score: NotRequired[float]
    of: NotRequired[str]


def as_files(record: ModelRecord) -> dict[str, str]:
    """The text of each file that says it, by name."""
    return {NAME: json.dumps(record) + "\n"}


def read_record(directory: Path) -> ModelRecord | None:
    """None where there is no such directory, or it does not say (of an earlier version, or damaged)."""
    with contextlib.suppress(FileError):
        return read_json(directory / NAME, ModelRecord)
    return None
