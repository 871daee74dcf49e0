"""A worker whose engine only keeps the weights: what a refit costs before any engine's own work."""

from __future__ import annotations

import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from nemo_disco.generation.worker.rollout_worker.wire import checksum, cut, map_staging


class PlainEngine:
    gpu = False

    def __init__(self, settings: dict[str, Any]) -> None:  # noqa: ARG002
        self.weights: dict[str, Tensor] = {}

    def open_staging(self, path: str, slot_bytes: int, remote: bool) -> list[dict[str, Any]]:  # noqa: ARG002
        self.slots = map_staging(path, 2 * slot_bytes).view(2, slot_bytes)
        return [{}]

    def begin_refit(self) -> None: ...

    def load_bucket(self, slot: int, tensors: Sequence[Any]) -> list[str]:
        found = []
        for name, tensor in cut(self.slots[slot], tensors):
            found.append(checksum(tensor))
            if name in self.weights:
                self.weights[name].copy_(tensor)
            else:
                self.weights[name] = tensor.clone()
        return found

    def finish_refit(self) -> None: ...

    def abort_refit(self) -> None: ...


def python(directory: Path) -> str:
    """An executable that is called like an engine's Python, and runs this file."""
    script = directory / "python"
    root = Path(__file__).parents[1]
    script.write_text(f'#!/bin/sh\nPYTHONPATH="$PYTHONPATH:{root}" exec {sys.executable} {__file__} "$@"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return str(script)


if __name__ == "__main__":
    import rollout_worker.__main__ as worker

    worker._engine = PlainEngine
    worker.main()
