"""Times of a step's phases: named spans of wall-clock seconds, opened where the time is spent.

`record_spans` collects the spans that code inside it opens with `span`; without a recording a span does nothing.
A GPU runs behind the program: there a span waits for the device at both ends, and is a range in Nsight Systems. Spans
are whole phases, so the waiting costs nothing. `profile_block` writes a trace of a whole step. Imports nothing heavy at
the top.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

from nemo_disco.runtime.files import atomic_file

Range = Callable[[str], AbstractContextManager[object]]


@dataclass
class SpanTimes:
    """Seconds by span name. wait(): returns when the device is done. range(name): a context around a span."""

    wait: Callable[[], object]
    range: Range
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))


_recording: ContextVar[SpanTimes | None] = ContextVar("recording", default=None)


@contextmanager
def record_spans(times: SpanTimes | None = None) -> Iterator[dict[str, float]]:
    """Record this thread's spans; yields the seconds by name, which grow as spans end. times: None for new ones."""
    times = times or _device_times()
    token = _recording.set(times)
    try:
        yield times.seconds
    finally:
        _recording.reset(token)


@contextmanager
def span(name: str) -> Iterator[None]:
    """Add the seconds of the block to `name` in the recording, if there is one; spans may nest and repeat."""
    times = _recording.get()
    if times is None:
        yield
        return
    times.wait()
    start = time.perf_counter()
    try:
        with times.range(name):
            yield
    finally:
        times.wait()
        times.seconds[name] += time.perf_counter() - start


def recorded_seconds() -> dict[str, float]:
    """The seconds of the present recording by span name; 0 for every name without a recording."""
    times = _recording.get()
    return defaultdict(float) if times is None else times.seconds


@contextmanager
def profile_block(directory: Path, rank: int) -> Iterator[None]:
    """Write torch's trace of the `with` block to `directory`/rank_R.json (chrome://tracing, Perfetto), and mark the
    block for `nsys profile --capture-range=cudaProfilerApi`. If the block raises there is no trace, but nsys is
    told that it ended. Not yet run on a GPU."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    marks = torch.cuda.profiler.profile() if cuda else nullcontext()
    with marks, profile(activities=activities, profile_memory=True) as trace:
        yield
        if cuda:
            torch.cuda.synchronize()
    with atomic_file(directory / f"rank_{rank}.json") as work:
        trace.export_chrome_trace(str(work))


def _device_times() -> SpanTimes:
    import torch

    if not torch.cuda.is_available():
        return SpanTimes(lambda: None, nullcontext)
    return SpanTimes(torch.cuda.synchronize, torch.cuda.nvtx.range)
