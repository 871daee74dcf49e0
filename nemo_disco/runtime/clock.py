"""Where a step's time goes: named spans of wall-clock seconds. Imports nothing heavy.

A GPU runs behind the program: `device_clock` waits for it at both ends of a span, and shows each as a range in Nsight
Systems. Spans are whole phases, so the waiting costs nothing.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

Range = Callable[[str], AbstractContextManager[object]]


class Clock:
    """`with clock("generate"): ...` adds to that span; spans may nest and repeat."""

    def __init__(self, wait: Callable[[], object] | None = None, shown_as: Range = nullcontext) -> None:
        """wait: until the device is done, before the time is read. shown_as: a context around each span, by name."""
        self.seconds: dict[str, float] = defaultdict(float)
        self._wait, self._shown_as = wait or (lambda: None), shown_as

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._wait()
        start = time.perf_counter()
        try:
            with self._shown_as(name):
                yield
        finally:
            self._wait()
            self.seconds[name] += time.perf_counter() - start


def device_clock() -> Clock:
    """A clock of the device that trains. On CUDA: not run."""
    import torch

    if not torch.cuda.is_available():
        return Clock()
    return Clock(torch.cuda.synchronize, torch.cuda.nvtx.range)
