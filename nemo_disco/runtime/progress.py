"""The console display of a run: reward, KL against delta, entropy, response length, tokens/s and the time left.
The KL is the one measured after the step's last update ("KL after"), else the last mini-batch's ("KL").

A live display on a terminal, one plain line per step elsewhere (a SLURM log). Rank 0 only. Reads metrics by their
public names and writes to the console alone.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

BLOCKS = "▁▂▃▄▅▆▇█"
HISTORY = 32


class Progress:
    """Context manager around the loop; call `update` once per step. delta: the objective's limit on KL, or None."""

    def __init__(
        self, max_steps: int, start_step: int = 0, delta: float | None = None, console: Console | None = None
    ) -> None:
        self._max_steps, self._start_step, self._delta = max_steps, start_step, delta
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._step = start_step
        self._start_time = time.monotonic()
        self._metrics: Mapping[str, object] = {}
        self._rewards: deque[float] = deque(maxlen=HISTORY)
        self._live: Live | None = None

    def __enter__(self) -> Progress:
        self._start_time = time.monotonic()
        if self._console.is_terminal:
            # Repaint once a second: the elapsed time advances, and a slow terminal is not kept busy.
            self._live = Live(get_renderable=self._render, console=self._console, refresh_per_second=1)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def update(self, metrics: Mapping[str, Any]) -> None:
        """Show one step's metrics, named as in metrics.jsonl; an absent or non-finite one is shown as "-"."""
        self._step, self._metrics = metrics["step"], metrics
        if (reward := _number(metrics, "reward/mean")) is not None:
            self._rewards.append(reward)
        if self._live is not None:
            self._live.refresh()
        else:
            values = "  ".join(f"{name} {value.plain}" for name, value in self._values().items())
            self._console.print(f"step {self._step}/{self._max_steps}  {values}  {self._time_left()} left")

    def print_line(self, text: str) -> None:
        """Print a line above the live display, or between the plain lines."""
        self._console.print(Text(text))

    def _values(self) -> dict[str, Text]:
        metrics = self._metrics
        tokens, seconds = _number(metrics, "tokens"), _number(metrics, "time/step")
        return {
            "reward": Text(_format(metrics, "reward/mean", ".3f")),
            **self._kl(),
            "entropy": Text(_format(metrics, "policy/entropy", ".3f")),
            "length": Text(_format(metrics, "response/length_mean", ",.0f")),
            "tokens/s": Text(f"{tokens / seconds:,.0f}" if tokens is not None and seconds else "-"),
        }

    def _kl(self) -> dict[str, Text]:
        """The step's KL against delta, by its label."""
        after = _number(self._metrics, "policy/kl_after") is not None
        label, name = ("KL after", "policy/kl_after") if after else ("KL", "policy/kl")
        kl, text = _number(self._metrics, name), _format(self._metrics, name, ".2e")
        if self._delta is None:
            return {label: Text(text)}
        above = kl is not None and kl > self._delta
        sign = ">" if above else "/" if kl is None else "<="
        return {label: Text(f"{text} {sign} delta {self._delta:.1e}", "yellow" if above else "")}

    def _time_left(self) -> str:
        if (steps := self._step - self._start_step) <= 0:
            return "-"
        return _duration((time.monotonic() - self._start_time) / steps * max(self._max_steps - self._step, 0))

    def _render(self) -> Group:
        header = Table.grid(padding=(0, 2))
        header.add_row(
            Text(f"step {self._step}/{self._max_steps}", "bold"),
            ProgressBar(total=self._max_steps, completed=self._step, width=HISTORY),
            Text(f"{_duration(time.monotonic() - self._start_time)} gone, {self._time_left()} left", "dim"),
        )
        body, values = Table.grid(padding=(0, 3)), self._values()
        body.add_row(*(Text(name, "dim") for name in values))
        body.add_row(*values.values())
        return Group(header, body, Text(f"reward {_sparkline(self._rewards)}", "dim"))


def _number(metrics: Mapping[str, object], name: str) -> float | None:
    value = metrics.get(name)
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _format(metrics: Mapping[str, object], name: str, spec: str) -> str:
    value = _number(metrics, name)
    return "-" if value is None else format(value, spec)


def _duration(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def _sparkline(values: deque[float]) -> str:
    if not values:
        return ""
    low, high = min(values), max(values)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((value - low) * scale)] for value in values)
