"""A trace that a browser can open, and a clock that waits for the device before it reads the time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from nemo_disco.runtime.clock import Clock, device_clock
from nemo_disco.runtime.profiler import profiled


def test_a_trace_names_what_ran(tmp_path: Path) -> None:
    with profiled(tmp_path / "step_3", rank=1):
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

    clock = Clock(lambda: said.append("wait"), shown)
    with clock("train"):
        said.append("work")
    assert said == ["wait", "begin train", "work", "end train", "wait"]
    assert clock.seconds["train"] > 0


def test_without_a_gpu_the_clock_waits_for_nothing() -> None:
    with device_clock()("train"):
        pass
