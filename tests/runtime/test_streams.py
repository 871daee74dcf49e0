"""Output that cannot be written, since its reader left or the disk is full: a run goes on, while a command whose result
is its output reports it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import os, sys
from rich.console import Console
from nemo_disco.runtime import streams
from nemo_disco.runtime.errors import UserError
streams.guard()
if sys.argv[1] == "run":
    streams.ignore_closed_output()
try:
    for i in range(3):
        Console().print("rich", i)
        print("plain \\u2581", i, flush=True)
        print("error", i, file=sys.stderr, flush=True)
    os.write(3, b"done")
except streams.ReaderLeftError:
    os.write(3, b"reader left")
except UserError as error:
    os.write(3, str(error).encode())
finally:
    streams.ignore_closed_output()
"""


def run_program(kind: str, redirection: str, environment: dict[str, str] | None = None) -> tuple[int, str, str]:
    """Run PROGRAM; return its exit code, its text on descriptor 3, and its stderr. redirection: of the shell; with an
    empty one, stdout is a pipe whose reader has left."""
    read, write = os.pipe()
    stdout_reader, stdout_writer = os.pipe()
    os.close(stdout_reader)  # before anything can be written
    shell = f'exec "$@" 3>&{write} {redirection}'
    command = ["bash", "-c", shell, "-", sys.executable, "-c", PROGRAM, kind]
    with os.fdopen(read) as end:
        process = subprocess.Popen(
            command, stdout=stdout_writer if redirection == "" else subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            pass_fds=[write], env=os.environ | (environment or {}),
        )  # fmt: skip
        os.close(write)
        os.close(stdout_writer)
        _, err = process.communicate(timeout=120)
        return process.returncode, end.read(), err


@pytest.mark.parametrize("redirection", ["", ">/dev/full", ">&-", "2>/dev/full", "2>&-", ">&- 2>&- <&-"])
def test_a_run_goes_on(redirection: str) -> None:
    code, end, err = run_program("run", redirection)
    assert (code, end) == (0, "done")
    assert err.count("the run goes on in silence") == (redirection in ("", ">/dev/full")) and "Traceback" not in err


def test_a_command_whose_reader_leaves_ends_without_a_message() -> None:
    assert run_program("command", "") == (0, "reader left", "")


def test_a_command_whose_output_is_lost_reports_it() -> None:
    assert run_program("command", ">/dev/full") == (0, "standard output cannot be written: No space left on device", "")


def test_a_character_outside_the_terminals_encoding_is_no_error() -> None:
    code, end, err = run_program("command", ">/dev/null", {"PYTHONIOENCODING": "ascii"})
    assert (code, end) == (0, "done") and "Error" not in err


@pytest.mark.parametrize(("command", "redirection", "code"), [("doctor", "| head -1", 0), ("doctor", ">/dev/full", 2)])
def test_lost_output_of_a_real_command(command: str, redirection: str, code: int) -> None:
    """doctor prints with rich, which would by itself end the process with exit code 1."""
    shell = f"set -o pipefail; {sys.executable} -m nemo_disco {command} {redirection}"
    process = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False)
    assert process.returncode == code, process.stderr
    message = "error: standard output cannot be written: No space left on device\n" if code else ""
    assert process.stderr == message
