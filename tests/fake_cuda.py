"""A CUDA of names alone, for what only tells a GPU or its profiler something: each call is written down in order."""

from __future__ import annotations

from typing import Any

import pytest
import torch


class Trace:
    """In place of torch.profiler.profile."""

    def __init__(self, said: list[str]) -> None:
        self.said = said

    def __enter__(self) -> Trace:
        self.said.append("trace")
        return self

    def __exit__(self, *_: object) -> None:
        self.said.append("traced")

    def export_chrome_trace(self, path: str) -> None:
        written = path.rsplit("/", 1)[-1]
        self.said.append(f"written {written.lstrip('.').partition('.tmp-')[0]}")  # which then gets its name


class Runtime:
    """In place of the CUDA runtime's profiler control."""

    def __init__(self, said: list[str]) -> None:
        self.said = said

    def cudaProfilerStart(self) -> int:  # noqa: N802 - CUDA's name
        self.said.append("capture")
        return 0

    def cudaProfilerStop(self) -> int:  # noqa: N802 - CUDA's name
        self.said.append("captured")
        return 0


def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What will be said to it: "push NAME" and "pop" of ranges, "wait", "capture" and "captured", "trace" and
    "traced"."""
    said: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: said.append("wait"))
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", lambda name: said.append(f"push {name}"))
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: said.append("pop"))
    monkeypatch.setattr(torch.cuda.profiler, "cudart", lambda: Runtime(said))
    monkeypatch.setattr(torch.cuda.profiler, "check_error", lambda code: None)  # noqa: ARG005 - torch's name

    def profile(activities: list[Any], **_: Any) -> Trace:
        assert torch.profiler.ProfilerActivity.CUDA in activities
        return Trace(said)

    monkeypatch.setattr(torch.profiler, "profile", profile)
    return said
