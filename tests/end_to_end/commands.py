"""Runs whole commands in real processes, on the quickstart's model and questions, with steps of about a second."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preloaded_server import BackgroundCommand, CommandResult, Server, clean_environment

from nemo_disco.config.paths import packaged_directory

QUICKSTART = packaged_directory("assets") / "quickstart"
REPO = Path(__file__).resolve().parents[2]
PAPER_DATA = Path(os.environ.get("NEMO_DISCO_PAPER_DATA", REPO.parent / "shared" / "data")) / "deepscaler"
RESPONSE_LIMIT = 64  # tokens
# A step has two mini-batches, of two micro-batches each.
SMALL = (
    "--config-name=quickstart",
    "trainer.max_steps=1",
    "data.questions_per_step=4",
    "algorithm.mini_batch_questions=2",
    "generation.responses_per_question=4",
    f"generation.max_response_length={RESPONSE_LIMIT}",
    "model.token_budget=256",
    "evaluation.enabled=false",
    "exp_manager.tensorboard=false",
)


class Commands:
    """Runs `nemo-disco COMMAND` on a few questions with SMALL settings: `commands(...)` runs a command to its end,
    `commands.start(...)` starts one in the background, and `commands.start_anew(...)` starts the real command line."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._small = [*SMALL]
        for key, name, count in (("data.train_files", "train", 64), ("evaluation.files", "test", 8)):
            lines = (QUICKSTART / f"{name}.jsonl").read_text().splitlines(keepends=True)[:count]
            (directory / f"{name}.jsonl").write_text("".join(lines))
            self._small.append(f"{key}=[{directory}/{name}.jsonl]")
        self._count = 0
        self._started: list[RunningCommand] = []
        self._server = Server()

    def __call__(
        self,
        command: str,
        *overrides: str,
        ranks: int = 1,
        life: float | None = None,
        stdout: str | None = None,
        stderr: str | None = None,
        **environment: str,
    ) -> CommandResult:
        """Run a command to its end.

        ranks: number of processes, which get the environment that torchrun gives. life: seconds until they are killed.
        stdout, stderr: files for the output, which is then missing from the result. environment: further variables.
        """
        devices = ("trainer.devices=1",) if ranks == 1 else ()  # else WORLD_SIZE rules
        files = self._make_files()
        code, seconds = self._server.run(
            self.arguments(command, *devices, *overrides),
            stdout or files["stdout"],
            stderr or files["stderr"],
            ranks=ranks,
            life=life,
            environment=environment,
        )
        return CommandResult(code, files["stdout"].read_text(), files["stderr"].read_text(), seconds)

    def start(self, command: str, *overrides: str, devices: int = 1, **environment: str) -> RunningCommand:
        """Start a command in the background. devices: number of processes, which the command starts itself."""
        if devices > 1:
            return self.start_anew(command, *overrides, devices=devices, **environment)
        files = self._make_files()
        arguments = self.arguments(command, "trainer.devices=1", *overrides)
        process = self._server.start(arguments, files["stdout"], files["stderr"], environment=environment)
        return self._watch(process, files)

    def start_anew(self, command: str, *overrides: str, devices: int = 1, **environment: str) -> RunningCommand:
        """Like `start`, in a new Python, which has imported nothing."""
        files = self._make_files()
        arguments = [
            *(sys.executable, "-m", "nemo_disco"),
            *self.arguments(command, f"trainer.devices={devices}", *overrides),
        ]
        with files["stdout"].open("w") as out, files["stderr"].open("w") as err:
            process = subprocess.Popen(arguments, stdout=out, stderr=err, env=clean_environment() | environment)
        return self._watch(process, files)

    def _watch(self, process: subprocess.Popen[bytes] | BackgroundCommand, files: dict[str, Path]) -> RunningCommand:
        self._started.append(RunningCommand(process, files["stdout"], files["stderr"], time.monotonic()))
        return self._started[-1]

    def arguments(self, command: str, *overrides: str) -> list[str]:
        """The arguments of the command line, after the program's name."""
        return [command, *self._small, *overrides]

    def close(self) -> None:
        for command in self._started:
            command.process.kill()
            command.process.wait()
        self._server.close()

    def _make_files(self) -> dict[str, Path]:
        """New empty files for a command's stdout and stderr, by these names."""
        self._count += 1
        files = {name: self.directory / f"{name}.{self._count}" for name in ("stdout", "stderr")}
        for path in files.values():
            path.touch()
        return files


@dataclass(frozen=True)
class RunningCommand:
    """A command that runs in the background."""

    process: subprocess.Popen[bytes] | BackgroundCommand
    stdout: Path
    stderr: Path
    start: float  # by time.monotonic()

    def wait(self, timeout: float = 240) -> CommandResult:
        code = self.process.wait(timeout)
        return CommandResult(code, self.stdout.read_text(), self.stderr.read_text(), time.monotonic() - self.start)

    def wait_for(self, path: Path, timeout: float = 240) -> None:
        """Wait until the path exists; fail if the command ends before that."""
        deadline = time.monotonic() + timeout
        while not path.exists():
            assert self.process.poll() is None, self.stderr.read_text() + self.stdout.read_text()
            assert time.monotonic() < deadline, f"{path} did not appear in {timeout} s"
            time.sleep(0.01)


FSYNC_HOOK = """
import os, time
original = os.fsync

def fsync(descriptor):
    if {name!r} in os.readlink(f"/proc/self/fd/{{descriptor}}"):
        {action}
    original(descriptor)

os.fsync = fsync
"""


def act_at_fsync(directory: Path, name: str, action: str) -> dict[str, str]:
    """Environment of a command that runs a line of Python, `action`, before it syncs a file with `name` in its path."""
    (directory / "sitecustomize.py").write_text(FSYNC_HOOK.format(name=name, action=action))
    return {"PYTHONPATH": str(directory)}


def wait_at_fsync(directory: Path, name: str) -> dict[str, str]:
    """Environment of a command that waits for directory/go to exist before it syncs a file with `name` in its path."""
    return act_at_fsync(directory, name, f"while not os.path.exists({str(directory / 'go')!r}): time.sleep(0.01)")


# Four steps with a checkpoint at the second and the last, and with an evaluation before and after them.
WHOLE_RUN = (
    "trainer.max_steps=4",
    "exp_manager.checkpoint_every_n_steps=2",
    "evaluation.enabled=true",
    "evaluation.samples=4",
    "exp_manager.tensorboard=true",
)


@dataclass(frozen=True)
class FinishedRun:
    """A finished run of WHOLE_RUN settings. ranks: number of data-parallel ranks; path: the run's directory."""

    ranks: int
    path: Path
    result: CommandResult


def run_directory(path: Path) -> str:
    """Override that sets the run's directory."""
    return f"exp_manager.explicit_log_dir={path}"


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The metrics of every step of a run, from its metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
