"""The display shows the same numbers on a terminal and in a log."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from nemo_disco.runtime.progress import Progress, _duration, _sparkline

METRICS = {
    "step": 3,
    "reward/mean": 0.53125,
    "policy/kl": 2.5e-3,
    "policy/entropy": 0.41,
    "response/length_mean": 1312.4,
    "tokens": 50_000,
    "time/step": 20.0,
}


def console(terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=120, highlight=False, soft_wrap=True)


def text(out: Console) -> str:
    """The text that the console printed, without escape sequences."""
    assert isinstance(out.file, io.StringIO)
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.file.getvalue())


def test_one_plain_line_a_step_without_a_terminal() -> None:
    out = console(terminal=False)
    with Progress(10, start_step=2, delta=1e-3, console=out) as progress:
        progress.update(METRICS)
        progress.print_line("step 4: the gradient is NaN [skipped]")
        progress.update({**METRICS, "step": 4, "policy/kl": 1e-4})
    first, message, second = text(out).splitlines()
    assert first.startswith(
        "step 3/10  reward 0.531  KL 2.50e-03 > delta 1.0e-03  entropy 0.410  length 1,312  tokens/s 2,500"
    )
    assert first.endswith(" left")
    assert message == "step 4: the gradient is NaN [skipped]"
    assert "KL 1.00e-04 <= delta 1.0e-03" in second
    assert text(out).isascii()


def test_the_kl_after_the_step_is_compared_with_delta_where_it_is_measured() -> None:
    out = console(terminal=False)
    with Progress(10, start_step=2, delta=1e-3, console=out) as progress:
        progress.update({**METRICS, "policy/kl_after": 9.9e-4})
        progress.update({**METRICS, "policy/kl_after": 2e-3, "policy/kl": 1e-4})
        progress.update({**METRICS, "policy/kl_after": None})  # no mini-batch was applied
    below, above, missing = text(out).splitlines()
    assert "  KL after 9.90e-04 <= delta 1.0e-03  " in below and "  KL after 2.00e-03 > delta 1.0e-03  " in above
    assert "  KL 2.50e-03 > delta 1.0e-03  " in missing


def test_missing_and_non_finite_values_show_as_a_dash() -> None:
    out = console(terminal=False)
    with Progress(5, console=out) as progress:
        progress.update({"step": 1, "reward/mean": float("nan"), "policy/kl": None})
    assert text(out).startswith("step 1/5  reward -  KL -  entropy -  length -  tokens/s -")


def test_the_terminal_shows_the_same_numbers() -> None:
    out = console(terminal=True)
    with Progress(10, delta=1e-3, console=out) as progress:
        progress.update(METRICS)
    output = text(out)
    for part in ("step 3/10", "0.531", "2.50e-03 > delta 1.0e-03", "0.410", "1,312", "2,500", "left"):
        assert part in output


def test_the_time_left_counts_the_steps_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("nemo_disco.runtime.progress.time.monotonic", lambda: now)
    out = console(terminal=False)
    with Progress(20, start_step=10, console=out) as progress:
        now += 60.0  # two steps in a minute, eight to go
        progress.update({**METRICS, "step": 12})
    assert text(out).rstrip().endswith("4:00 left")


def test_durations_and_sparklines() -> None:
    from collections import deque

    assert [_duration(s) for s in (0, 59.6, 3600)] == ["0:00", "1:00", "1:00:00"]
    assert _sparkline(deque([0.0, 0.5, 1.0])) == "▁▅█"
    assert _sparkline(deque([2.0, 2.0])) == "▁▁"
    assert _sparkline(deque()) == ""
