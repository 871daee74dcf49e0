"""Standard output and error that fail: the reader has left (`| head`), or the disk is full.

A run goes on without output; a command whose output is its result ends. Touches sys.stdout, sys.stderr and descriptors
0 to 2 alone.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import sys
from typing import Any, TextIO

from nemo_disco.runtime.errors import UserError


class ReaderLeftError(Exception):
    """The reader of standard output has left (`| head`). Not an OSError, which libraries would handle as their own."""


class _Raw(io.FileIO):
    """A descriptor that becomes /dev/null at the first failure to write; for stdout the failure is reported."""

    tolerant = False  # for all instances: see ignore_closed_output

    def __init__(self, descriptor: int, name: str) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._stream_name = name

    def write(self, data: Any, /) -> int:
        size = memoryview(data).nbytes
        try:
            while (count := super().write(data)) is None:  # its reader made it non-blocking, and it is full
                select.select([], [self], [])
            return count
        except OSError as error:
            with open(os.devnull, "w") as null:
                os.dup2(null.fileno(), self.fileno())
            if self._stream_name == "stdout":
                self._report(error)
            return size

    def _report(self, error: OSError) -> None:
        if _Raw.tolerant:
            message = f"warning: standard output cannot be written ({error.strerror}): the run goes on in silence\n"
            with contextlib.suppress(OSError):  # not through sys.stderr, which a live display redirects to stdout
                os.write(2, message.encode())
        elif error.errno == errno.EPIPE:
            raise ReaderLeftError
        else:
            raise UserError(f"standard output cannot be written: {error.strerror}")


def guard() -> None:
    """Make failures to write standard output raise UserError or ReaderLeftError, and ignore those of standard error.
    Closed streams become /dev/null: else the next file that is opened would get their descriptor."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest free number, which is this one
    for name in ("stdout", "stderr"):
        stream: TextIO | None = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - never closed
        elif stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError):
                stream.flush()
            guarded = io.TextIOWrapper(
                io.BufferedWriter(_Raw(stream.fileno(), name)),
                encoding=stream.encoding,
                errors="backslashreplace",  # a character that the terminal's encoding lacks must not end a run either
                line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            )
            setattr(sys, name, guarded)


def ignore_closed_output() -> None:
    """Make later failures to write standard output raise nothing; one warning on standard error reports them."""
    _Raw.tolerant = True
