"""Requests to stop: on SIGTERM, SIGUSR1 or SIGHUP (the terminal is gone) a run finishes its step, saves and exits 0.

The handler only sets a flag, so a second signal changes nothing. The training loop makes all ranks agree on the flag
before they act on it. Must not import torch.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_stop_time: float | None = None  # time.monotonic() of the first stop signal inside a `with StopRequest()`


class StoppedError(Exception):
    """Raised in place of work that would take too long after a request to stop."""


def seconds_since_stop() -> float | None:
    """Seconds since this process received a request to stop, None without one. Any thread may call this."""
    return None if _stop_time is None else time.monotonic() - _stop_time


def is_ignored(number: signal.Signals) -> bool:
    """True for SIGHUP in a process that was started with nohup, where the signal must stay ignored."""
    return number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN


class StopRequest:
    """Context manager in which STOP_SIGNALS set `number` instead of ending the process.

    Enter it in the main thread, the only one in which Python installs handlers; the exit restores the earlier ones.
    number: of the first signal received, 0 before it.
    """

    def __init__(self) -> None:
        self.number = 0
        self._earlier: dict[signal.Signals, Any] = {}

    @property
    def signal_name(self) -> str | None:
        return signal.Signals(self.number).name if self.number else None

    def __enter__(self) -> StopRequest:
        for number in (n for n in STOP_SIGNALS if not is_ignored(n)):
            self._earlier[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        global _stop_time
        for number, handler in self._earlier.items():
            # None: the earlier handler was not installed from Python, so Python cannot restore it.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._earlier.clear()
        _stop_time = None

    def _handle(self, number: int, _: FrameType | None) -> None:
        global _stop_time
        self.number = self.number or number
        _stop_time = time.monotonic() if _stop_time is None else _stop_time


@contextlib.contextmanager
def shield_children() -> Iterator[None]:
    """Block STOP_SIGNALS in processes that the `with` block starts, since SLURM signals all processes of a task."""
    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # children inherit the mask, through exec too
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, earlier)
