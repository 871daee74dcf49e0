"""Standard output and error of a command: what happens when nobody reads them any more, or their disk is full.

A run goes on in silence; a command whose output is its result ends. Touches sys.stdout, sys.stderr and descriptors 0
to 2 alone.
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
    """Whoever read standard output is gone (`| head`); not an OSError, which libraries would take for their own."""


class _Raw(io.FileIO):
    """A descriptor that swallows what it cannot write, once said."""

    tolerant = False  # of all of them: see tolerate

    def __init__(self, descriptor: int, name: str) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._stream_name = name

    def write(self, data: Any, /) -> int:
        size = memoryview(data).nbytes
        try:
            while (written := super().write(data)) is None:  # the other side made it non-blocking, and it is full
                select.select([], [self], [])
            return written
        except OSError as error:
            with open(os.devnull, "w") as nothing:
                os.dup2(nothing.fileno(), self.fileno())
            if self._stream_name == "stdout":
                self._complain(error)
            return size

    def _complain(self, error: OSError) -> None:
        if _Raw.tolerant:
            said = f"warning: standard output cannot be written ({error.strerror}): the run goes on in silence\n"
            with contextlib.suppress(OSError):  # not by sys.stderr: a live display takes that to standard output
                os.write(2, said.encode())
        elif error.errno == errno.EPIPE:
            raise ReaderLeftError
        else:
            raise UserError(f"standard output cannot be written: {error.strerror}")


def guard() -> None:
    """Make standard output and error such that a failure to write them is a UserError or a ReaderLeftError of standard
    output, and nothing of standard error. Those that are closed become /dev/null, or the next file that is opened would
    be taken for them."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number: this one
    for name in ("stdout", "stderr"):
        stream: TextIO | None = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - for the life of the process
        elif stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError):
                stream.flush()
            setattr(sys, name, _guarded(stream, name))


def tolerate() -> None:
    """From now on a failure to write standard output is said once, on standard error, and nothing else."""
    _Raw.tolerant = True


def _guarded(stream: io.TextIOWrapper, name: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(
        io.BufferedWriter(_Raw(stream.fileno(), name)),
        encoding=stream.encoding,
        errors="backslashreplace",  # a terminal that lacks a letter must not end a run either
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
