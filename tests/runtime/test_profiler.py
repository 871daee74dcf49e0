"""The profiler's trace is JSON for a browser; spans wait for the device before they read the time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from fake_cuda import install_fake_cuda

from nemo_disco.runtime.spans import SpanTimes, profile_block, record_spans, recorded_seconds, span


def test_a_trace_names_the_operators_that_ran(tmp_path: Path) -> None:
    with profile_block(tmp_path / "step_3", rank=1):
        torch.ones(64, 64) @ torch.ones(64, 64)
    events = json.loads((tmp_path / "step_3" / "rank_1.json").read_text())["traceEvents"]
    assert any(event.get("name") == "aten::mm" for event in events)


def test_a_span_waits_at_both_ends_and_is_shown() -> None:
    calls: list[str] = []

    @contextmanager
    def show(name: str) -> Iterator[None]:
        calls.append(f"begin {name}")
        yield
        calls.append(f"end {name}")

    with record_spans(SpanTimes(lambda: calls.append("wait"), show)) as seconds, span("train"):
        calls.append("work")
    assert calls == ["wait", "begin train", "work", "end train", "wait"]
    assert seconds["train"] > 0


def test_a_span_counts_in_the_recording_around_it_alone() -> None:
    with span("train"):  # outside every recording
        assert recorded_seconds()["train"] == 0
    with record_spans() as outer:
        with record_spans() as inner, span("train"):
            pass
        assert recorded_seconds() is outer
    assert list(inner) == ["train"] and not outer


def test_spans_are_ranges_one_within_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranges are torch's own, on fakes of the CUDA functions that it calls."""
    calls = install_fake_cuda(monkeypatch)
    with record_spans(), span("step"):
        with span("generate"):
            calls.append("work")
        with span("train"):
            pass
    marks = [call for call in calls if call != "wait"]
    assert marks == ["push step", "push generate", "work", "pop", "push train", "pop", "pop"]
    assert calls[0] == calls[-1] == "wait" and calls.count("wait") == 6


def test_a_span_that_raises_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = install_fake_cuda(monkeypatch)
    with record_spans() as seconds, pytest.raises(RuntimeError, match="in the span"), span("step"), span("train"):
        raise RuntimeError("in the span")
    assert calls == ["wait", "push step", "wait", "push train", "pop", "wait", "pop", "wait"]
    assert seconds.keys() == {"step", "train"}


def test_nsys_is_told_where_a_profiled_step_begins_and_ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = install_fake_cuda(monkeypatch)
    with profile_block(tmp_path / "step_3", rank=1):
        calls.append("work")
    assert calls == ["capture", "trace", "work", "wait", "traced", "captured", "written rank_1.json"]


def test_nsys_is_told_that_a_step_has_ended_by_raising(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = install_fake_cuda(monkeypatch)
    with pytest.raises(RuntimeError, match="in the step"), profile_block(tmp_path / "step_3", rank=1):
        raise RuntimeError("in the step")
    assert calls == ["capture", "trace", "traced", "captured"]
