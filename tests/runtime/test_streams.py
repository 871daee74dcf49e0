"""The reader has left or the disk is full: a run goes on, a command whose output is its result reports it."""

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


def outcome(kind: str, closes: str, environment: dict[str, str] | None = None) -> tuple[int, str, str]:
    """Exit code of PROGRAM, its last word on descriptor 3, and its stderr. closes: a shell's redirections; with none,
    nobody reads stdout."""
    read, write = os.pipe()
    left, unread = os.pipe()
    os.close(left)  # before anything can be written
    shell = f'exec "$@" 3>&{write} {closes}'
    command = ["bash", "-c", shell, "-", sys.executable, "-c", PROGRAM, kind]
    with os.fdopen(read) as end:
        process = subprocess.Popen(
            command, stdout=unread if closes == "" else subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            pass_fds=[write], env=os.environ | (environment or {}),
        )  # fmt: skip
        os.close(write)
        os.close(unread)
        _, err = process.communicate(timeout=120)
        return process.returncode, end.read(), err


@pytest.mark.parametrize("closes", ["", ">/dev/full", ">&-", "2>/dev/full", "2>&-", ">&- 2>&- <&-"])
def test_a_run_goes_on(closes: str) -> None:
    code, end, err = outcome("run", closes)
    assert (code, end) == (0, "done")
    assert err.count("the run goes on in silence") == (closes in ("", ">/dev/full")) and "Traceback" not in err


def test_a_command_whose_reader_leaves_ends_without_a_message() -> None:
    assert outcome("command", "") == (0, "reader left", "")


def test_a_command_whose_output_is_lost_reports_it() -> None:
    assert outcome("command", ">/dev/full") == (0, "standard output cannot be written: No space left on device", "")


def test_a_character_outside_the_terminals_encoding_is_no_error() -> None:
    code, end, err = outcome("command", ">/dev/null", {"PYTHONIOENCODING": "ascii"})
    assert (code, end) == (0, "done") and "Error" not in err


@pytest.mark.parametrize(("command", "closes", "code"), [("doctor", "| head -1", 0), ("doctor", ">/dev/full", 2)])
def test_commands(command: str, closes: str, code: int) -> None:
    """doctor writes through rich, which would exit with 1."""
    shell = f"set -o pipefail; {sys.executable} -m nemo_disco {command} {closes}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    message = "error: standard output cannot be written: No space left on device\n" if code else ""
    assert done.stderr == message
