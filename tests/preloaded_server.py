"""The process of preloaded.py, which has imported everything: a command that it is asked for starts in milliseconds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Done:
    """The outcome of a command."""

    code: int
    out: str
    err: str
    seconds: float

    def ok(self) -> Done:
        assert self.code == 0, self.err + self.out
        return self


@dataclass(frozen=True)
class Background:
    """A command that runs, with the methods of subprocess.Popen. exit_code: the file that its end makes."""

    pid: int
    exit_code: Path

    def poll(self) -> int | None:
        return int(self.exit_code.read_text()) if self.exit_code.exists() else None

    def wait(self, timeout: float = 240) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.01)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


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
        began = time.monotonic()
        return self._ask(arguments, stdout, stderr, job), time.monotonic() - began

    def start(self, arguments: Sequence[str], stdout: Path, stderr: Path, **job: Any) -> Background:
        """As `run`, in the background, on one rank."""
        exit_code = stdout.with_suffix(f"{stdout.suffix}.exit_code")
        pid = self._ask(arguments, stdout, stderr, job | {"exit_code": str(exit_code)})
        return Background(pid, exit_code)

    def _ask(self, arguments: Sequence[str], stdout: Path | str, stderr: Path | str, job: dict[str, Any]) -> int:
        assert self._process.stdin is not None and self._process.stdout is not None
        job |= {"arguments": [*arguments], "stdout": str(stdout), "stderr": str(stderr)}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


def clean_environment() -> dict[str, str]:
    """This process's, on one thread, without torchrun's word on who it is."""
    mine = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return mine | {"OMP_NUM_THREADS": "1"}
