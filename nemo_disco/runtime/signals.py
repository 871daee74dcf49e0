"""A polite end: SIGTERM, SIGUSR1 and SIGHUP (the terminal is gone) ask the loop to finish its step, save and exit 0.

The handler only sets a flag, so a second signal loses nothing. Ranks must agree on the flag before they act on it (the
loop's business). Must not import torch.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


def is_ignored(number: signal.Signals) -> bool:
    """Whether this process was started to outlive its terminal (nohup): then SIGHUP stays ignored."""
    return number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN


class StopRequest:
    """While it is entered, STOP_SIGNALS set `requested` instead of ending the process.

    Enter it in the main thread (Python installs handlers nowhere else). The earlier handlers come back on exit.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._earlier: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        return self.signal_name is not None

    def __enter__(self) -> StopRequest:
        for number in (n for n in STOP_SIGNALS if not is_ignored(n)):
            self._earlier[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for number, handler in self._earlier.items():
            # None: the earlier handler was not installed from Python, so it cannot be put back from Python.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._earlier.clear()

    def _note(self, number: int, _: FrameType | None) -> None:
        self.signal_name = self.signal_name or signal.Signals(number).name


@contextlib.contextmanager
def spared_children() -> Iterator[None]:
    """Processes that are started in here never get these signals: SLURM sends them to all that a task started."""
    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # children inherit the mask, through exec too
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, earlier)
