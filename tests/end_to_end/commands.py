"""Whole commands on real processes, on the quickstart's model and questions, with steps of about a second."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preloaded_server import Background, Done, Server, clean_environment

from nemo_disco.config.paths import packaged

QUICKSTART = packaged("assets") / "quickstart"
REPO = Path(__file__).resolve().parents[2]
PAPER_DATA = Path(os.environ.get("NEMO_DISCO_PAPER_DATA", REPO.parent / "shared" / "data")) / "deepscaler"
LIMIT = 64  # tokens of a response
# Two mini-batches a step, of two micro-batches each.
SMALL = (
    "--config-name=quickstart",
    "trainer.max_steps=1",
    "data.questions_per_step=4",
    "algorithm.mini_batch_questions=2",
    "generation.responses_per_question=4",
    f"generation.max_response_length={LIMIT}",
    "model.token_budget=256",
    "evaluation.enabled=false",
    "exp_manager.tensorboard=false",
)


class Commands:
    """`nemo-disco COMMAND` on a few questions with SMALL settings: `commands(...)` runs one to its end,
    `commands.start(...)` one in the background, and `commands.start_anew(...)` the real command line."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._small = [*SMALL]
        for key, name, count in (("data.train_files", "train", 64), ("evaluation.files", "test", 8)):
            lines = (QUICKSTART / f"{name}.jsonl").read_text().splitlines(keepends=True)[:count]
            (directory / f"{name}.jsonl").write_text("".join(lines))
            self._small.append(f"{key}=[{directory}/{name}.jsonl]")
        self._count = 0
        self._started: list[Started] = []
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
    ) -> Done:
        """ranks: processes, started as torchrun does. life: seconds until they are killed. stdout, stderr: where these
        go, if not to the files of which Done tells."""
        devices = ("trainer.devices=1",) if ranks == 1 else ()  # else WORLD_SIZE rules
        files = self._files()
        code, seconds = self._server.run(
            self.arguments(command, *devices, *overrides),
            stdout or files["stdout"],
            stderr or files["stderr"],
            ranks=ranks,
            life=life,
            environment=environment,
        )
        return Done(code, files["stdout"].read_text(), files["stderr"].read_text(), seconds)

    def start(self, command: str, *overrides: str, devices: int = 1, **environment: str) -> Started:
        """devices: processes, started by the command itself."""
        if devices > 1:
            return self.start_anew(command, *overrides, devices=devices, **environment)
        files = self._files()
        arguments = self.arguments(command, "trainer.devices=1", *overrides)
        process = self._server.start(arguments, files["stdout"], files["stderr"], environment=environment)
        return self._watched(process, files)

    def start_anew(self, command: str, *overrides: str, devices: int = 1, **environment: str) -> Started:
        """As `start`, in a Python that has imported nothing."""
        files = self._files()
        arguments = [
            *(sys.executable, "-m", "nemo_disco"),
            *self.arguments(command, f"trainer.devices={devices}", *overrides),
        ]
        with files["stdout"].open("w") as out, files["stderr"].open("w") as err:
            process = subprocess.Popen(arguments, stdout=out, stderr=err, env=clean_environment() | environment)
        return self._watched(process, files)

    def _watched(self, process: subprocess.Popen[bytes] | Background, files: dict[str, Path]) -> Started:
        self._started.append(Started(process, files["stdout"], files["stderr"], time.monotonic()))
        return self._started[-1]

    def arguments(self, command: str, *overrides: str) -> list[str]:
        """Of the command line, after its name."""
        return [command, *self._small, *overrides]

    def close(self) -> None:
        for started in self._started:
            started.process.kill()
            started.process.wait()
        self._server.close()

    def _files(self) -> dict[str, Path]:
        self._count += 1
        files = {name: self.directory / f"{name}.{self._count}" for name in ("stdout", "stderr")}
        for path in files.values():
            path.touch()
        return files


@dataclass(frozen=True)
class Started:
    """A command that runs in the background."""

    process: subprocess.Popen[bytes] | Background
    stdout: Path
    stderr: Path
    began: float

    def wait(self, timeout: float = 240) -> Done:
        code = self.process.wait(timeout)
        return Done(code, self.stdout.read_text(), self.stderr.read_text(), time.monotonic() - self.began)

    def wait_for(self, path: Path, timeout: float = 240) -> None:
        """Until the path is there; fails if the command ends before."""
        deadline = time.monotonic() + timeout
        while not path.exists():
            assert self.process.poll() is None, self.stderr.read_text() + self.stdout.read_text()
            assert time.monotonic() < deadline, f"{path} did not appear in {timeout} s"
            time.sleep(0.01)


ON_FSYNC = """
import os, time
sound = os.fsync

def fsync(descriptor):
    if {name!r} in os.readlink(f"/proc/self/fd/{{descriptor}}"):
        {action}
    sound(descriptor)

os.fsync = fsync
"""


def on_fsync(directory: Path, name: str, action: str) -> dict[str, str]:
    """The environment of a command that runs `action`, a line of Python, whenever it syncs a file of this name."""
    (directory / "sitecustomize.py").write_text(ON_FSYNC.format(name=name, action=action))
    return {"PYTHONPATH": str(directory)}


def held(directory: Path, name: str) -> dict[str, str]:
    """The environment of a command that does not get past writing a file of this name before directory/go is there."""
    return on_fsync(directory, name, f"while not os.path.exists({str(directory / 'go')!r}): time.sleep(0.01)")


# Four steps with a checkpoint at the second and the last, evaluated before and after.
WHOLE = (
    "trainer.max_steps=4",
    "exp_manager.checkpoint_every_n_steps=2",
    "evaluation.enabled=true",
    "evaluation.samples=4",
    "exp_manager.tensorboard=true",
)


@dataclass(frozen=True)
class Finished:
    """A run of WHOLE settings: on so many ranks (data-parallel), its directory, and how the command ended."""

    ranks: int
    path: Path
    done: Done


def at(path: Path) -> str:
    return f"exp_manager.explicit_log_dir={path}"


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
