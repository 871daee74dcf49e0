"""A torch profiler trace of chosen steps, and the marks by which `nsys profile --capture-range=cudaProfilerApi` records
the same steps. Touches the run directory's profile/ alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from nemo_disco.runtime.files import atomic_file


@contextmanager
def profiled(directory: Path, rank: int) -> Iterator[None]:
    """Write what runs inside to `directory`/rank_R.json (chrome://tracing, Perfetto). nsys is told where it ends also
    when it raises; then there is no trace. Its CUDA half: not run."""
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
