"""Writes a torch profiler trace of chosen steps, and marks them for `nsys profile --capture-range=cudaProfilerApi`.
Touches the run directory's profile/ alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from nemo_disco.runtime.files import atomic_file


@contextmanager
def profile_block(directory: Path, rank: int) -> Iterator[None]:
    """Trace the `with` block into `directory`/rank_R.json (chrome://tracing, Perfetto). If it raises there is no trace,
    but nsys is told that it ended. Not yet run on a GPU."""
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
