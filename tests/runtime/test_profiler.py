"""The profiler's trace opens in a browser; spans wait for the device before they read the time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from fake_cuda import fake_cuda

from nemo_disco.runtime.timing import SpanTimes, profile_block, record_spans, recorded_seconds, span


def test_a_trace_names_what_ran(tmp_path: Path) -> None:
    with profile_block(tmp_path / "step_3", rank=1):
        torch.ones(64, 64) @ torch.ones(64, 64)
    events = json.loads((tmp_path / "step_3" / "rank_1.json").read_text())["traceEvents"]
    assert any(event.get("name") == "aten::mm" for event in events)


def test_a_span_waits_at_both_ends_and_is_shown() -> None:
    said: list[str] = []

    @contextmanager
    def shown(name: str) -> Iterator[None]:
        said.append(f"begin {name}")
        yield
        said.append(f"end {name}")

    with record_spans(SpanTimes(lambda: said.append("wait"), shown)) as seconds, span("train"):
        said.append("work")
    assert said == ["wait", "begin train", "work", "end train", "wait"]
    assert seconds["train"] > 0


def test_a_span_counts_in_the_recording_around_it_alone() -> None:
    with span("train"):  # of no recording
        assert recorded_seconds()["train"] == 0
    with record_spans() as outer:
        with record_spans() as inner, span("train"):
            pass
        assert recorded_seconds() is outer
    assert list(inner) == ["train"] and not outer


def test_spans_are_ranges_one_within_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own range, on stand-ins of what it calls."""
    said = fake_cuda(monkeypatch)
    with record_spans(), span("step"):
        with span("generate"):
            said.append("work")
        with span("train"):
            pass
    assert [x for x in said if x != "wait"] == ["push step", "push generate", "work", "pop", "push train", "pop", "pop"]
    assert said[0] == said[-1] == "wait" and said.count("wait") == 6


def test_a_span_that_raises_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    said = fake_cuda(monkeypatch)
    with record_spans() as seconds, pytest.raises(RuntimeError, match="in the span"), span("step"), span("train"):
        raise RuntimeError("in the span")
    assert said == ["wait", "push step", "wait", "push train", "pop", "wait", "pop", "wait"]
    assert seconds.keys() == {"step", "train"}


def test_nsys_is_told_where_a_profiled_step_begins_and_ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said = fake_cuda(monkeypatch)
    with profile_block(tmp_path / "step_3", rank=1):
        said.append("work")
    assert said == ["capture", "trace", "work", "wait", "traced", "captured", "written rank_1.json"]


def test_nsys_is_told_that_a_step_has_ended_by_raising(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said = fake_cuda(monkeypatch)
    with pytest.raises(RuntimeError, match="in the step"), profile_block(tmp_path / "step_3", rank=1):
        raise RuntimeError("in the step")
    assert said == ["capture", "trace", "traced", "captured"]
