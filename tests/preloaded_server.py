"""The process of preloaded.py, which has imported everything: a command that it is asked for starts in milliseconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str
    seconds: float

    def ok(self) -> Done:
        assert self.code == 0, self.err + self.out
        return self


class Server:
    """Runs `nemo-disco ARGUMENTS` to its end, one command after another. `close` ends it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("preloaded.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=clean_environment(),
            start_new_session=True,
        )
        assert self._process.stdout is not None and self._process.stdout.readline() == "ready\n"

    def run(self, arguments: Sequence[str], stdout: Path | str, stderr: Path | str, **job: Any) -> tuple[int, float]:
        """The exit code and the seconds. stdout, stderr: existing files. job: what else preloaded.py takes."""
        assert self._process.stdin is not None and self._process.stdout is not None
        job |= {"arguments": [*arguments], "stdout": str(stdout), "stderr": str(stderr)}
        began = time.monotonic()
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline()), time.monotonic() - began

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


def clean_environment() -> dict[str, str]:
    """This process's, on one thread, without torchrun's word on who it is."""
    mine = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return mine | {"OMP_NUM_THREADS": "1"}
