"""Stand-ins for the calls to CUDA, NVTX and the profilers, for tests without a GPU: they only record their names."""

from __future__ import annotations

from typing import Any

import pytest
import torch


class Trace:
    """Stands in for torch.profiler.profile."""

    def __init__(self, calls: list[str]) -> None:
        self.calls = calls

    def __enter__(self) -> Trace:
        self.calls.append("trace")
        return self

    def __exit__(self, *_: object) -> None:
        self.calls.append("traced")

    def export_chrome_trace(self, path: str) -> None:
        temporary = path.rsplit("/", 1)[-1]  # .NAME.tmp-..., which is then renamed to NAME
        self.calls.append(f"written {temporary.lstrip('.').partition('.tmp-')[0]}")


class Runtime:
    """Stands in for the CUDA runtime, of which only the control of a profiler is called."""

    def __init__(self, calls: list[str]) -> None:
        self.calls = calls

    def cudaProfilerStart(self) -> int:  # noqa: N802 - CUDA's name
        self.calls.append("capture")
        return 0

    def cudaProfilerStop(self) -> int:  # noqa: N802 - CUDA's name
        self.calls.append("captured")
        return 0


def install_fake_cuda(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace torch's calls to CUDA. Returns a list that receives the later calls, in order.

    "push NAME" and "pop" of a range; "wait" for the GPU; "capture" and "captured": the start and end of a capture by an
    outer profiler; "trace" and "traced": the start and end of torch's trace; "written NAME": the trace's file.
    """
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("wait"))
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", lambda name: calls.append(f"push {name}"))
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: calls.append("pop"))
    monkeypatch.setattr(torch.cuda.profiler, "cudart", lambda: Runtime(calls))
    monkeypatch.setattr(torch.cuda.profiler, "check_error", lambda code: None)  # noqa: ARG005 - torch's name

    def profile(activities: list[Any], **_: Any) -> Trace:
        assert torch.profiler.ProfilerActivity.CUDA in activities
        return Trace(calls)

    monkeypatch.setattr(torch.profiler, "profile", profile)
    return calls
