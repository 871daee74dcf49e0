"""A polite end: SIGTERM, SIGUSR1 and SIGHUP (the terminal is gone) ask the loop to finish its step, save and exit 0.

The handler only sets a flag, so a second signal loses nothing. Ranks must agree on the flag before they act on it (the
loop's business). Must not import torch.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_asked_at: float | None = None  # when the first of them came to a StopRequest that is entered, by the monotonic clock


class StoppedError(Exception):
    """Work was given up, since this process is asked to stop and the work may take too long."""


def seconds_since_stop() -> float | None:
    """How long ago this process was asked to stop; None where it was not. For any thread."""
    return None if _asked_at is None else time.monotonic() - _asked_at


def is_ignored(number: signal.Signals) -> bool:
    """Whether this process was started to outlive its terminal (nohup): then SIGHUP stays ignored."""
    return number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN


class StopRequest:
    """While it is entered, STOP_SIGNALS set `requested` instead of ending the process.

    Enter it in the main thread (Python installs handlers nowhere else). The earlier handlers come back on exit.
    number: of the first signal, 0 before it.
    """

    def __init__(self) -> None:
        self.number = 0
        self._earlier: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        return self.number != 0

    @property
    def signal_name(self) -> str | None:
        return signal.Signals(self.number).name if self.number else None

    def __enter__(self) -> StopRequest:
        for number in (n for n in STOP_SIGNALS if not is_ignored(n)):
            self._earlier[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for number, handler in self._earlier.items():
            # None: the earlier handler was not installed from Python, so it cannot be put back from Python.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._earlier.clear()
        _note_stop(None)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.number = self.number or number
        if _asked_at is None:
            _note_stop(time.monotonic())


def _note_stop(now: float | None) -> None:
    global _asked_at
    _asked_at = now


@contextlib.contextmanager
def spared_children() -> Iterator[None]:
    """Processes that are started in here never get these signals: SLURM sends them to all that a task started."""
    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # children inherit the mask, through exec too
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, earlier)
