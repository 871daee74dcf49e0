"""Client of a preloaded.py process, which has imported everything, so that a command starts in milliseconds."""

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
class CommandResult:
    """A command's exit code, its output on stdout and stderr, and the seconds that it took."""

    code: int
    out: str
    err: str
    seconds: float

    def ok(self) -> CommandResult:
        """This result; fails unless the exit code is 0."""
        assert self.code == 0, self.err + self.out
        return self


@dataclass(frozen=True)
class BackgroundCommand:
    """A command that runs in the background, with methods of subprocess.Popen.

    exit_code: the file that is written when it ends.
    """

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
    """Runs commands `nemo-disco ARGUMENTS` in forks of one process, which `close` ends."""

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
        """Run a command to its end. Returns (its exit code, the seconds that it took).

        stdout, stderr: existing files. job: further keys of preloaded.run.
        """
        began = time.monotonic()
        return self._ask(arguments, stdout, stderr, job), time.monotonic() - began

    def start(self, arguments: Sequence[str], stdout: Path, stderr: Path, **job: Any) -> BackgroundCommand:
        """Start a command in the background, on one rank. Arguments: those of `run`."""
        exit_code = stdout.with_suffix(f"{stdout.suffix}.exit_code")
        pid = self._ask(arguments, stdout, stderr, job | {"exit_code": str(exit_code)})
        return BackgroundCommand(pid, exit_code)

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
    """This process's environment, without torchrun's RANK and WORLD_SIZE, and with one thread for OpenMP."""
    variables = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return variables | {"OMP_NUM_THREADS": "1"}
