"""What a person watches during a run: reward, KL against delta, entropy, length, tokens/s and the time left.

A live display on a terminal, one plain line a step elsewhere (a SLURM log). Rank 0 only. Reads metrics by their public
names and writes to the console, nothing else.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

BLOCKS = "▁▂▃▄▅▆▇█"
HISTORY = 32
METRICS = ("reward", "KL", "entropy", "length", "tokens/s")


class Progress:
    """Enter it around the loop; `update` once a step. delta None: the objective has no KL limit."""

    def __init__(
        self, max_steps: int, start_step: int = 0, delta: float | None = None, console: Console | None = None
    ) -> None:
        self._max_steps, self._start, self._delta = max_steps, start_step, delta
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._step = start_step
        self._begun = time.monotonic()
        self._metrics: Mapping[str, object] = {}
        self._rewards: deque[float] = deque(maxlen=HISTORY)
        self._live: Live | None = None

    def __enter__(self) -> Progress:
        self._begun = time.monotonic()
        if self._console.is_terminal:
            # A second between repaints: the elapsed time ticks, and a slow terminal is not kept busy.
            self._live = Live(get_renderable=self._render, console=self._console, refresh_per_second=1)
            self._live.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def update(self, metrics: Mapping[str, object]) -> None:
        """Take one step's metrics (the names of metrics.jsonl); one that is absent or not finite shows as -."""
        step = _number(metrics, "step")
        self._step = int(step) if step is not None else self._step + 1
        self._metrics = metrics
        reward = _number(metrics, "reward/mean")
        if reward is not None:
            self._rewards.append(reward)
        if self._live is not None:
            self._live.refresh()
        else:
            values = "  ".join(f"{name} {value.plain}" for name, value in self._values().items())
            self._console.print(f"step {self._step}/{self._max_steps}  {values}  {self._time_left()} left")

    def message(self, text: str) -> None:
        """A line above the display, or between the plain lines."""
        self._console.print(Text(text))

    def _values(self) -> dict[str, Text]:
        m = self._metrics
        tokens, seconds = _number(m, "tokens"), _number(m, "time/step")
        rate = f"{tokens / seconds:,.0f}" if tokens is not None and seconds else "-"
        return {
            "reward": Text(_show(_number(m, "reward/mean"), ".3f")),
            "KL": self._kl(),
            "entropy": Text(_show(_number(m, "policy/entropy"), ".3f")),
            "length": Text(_show(_number(m, "response/length_mean"), ",.0f")),
            "tokens/s": Text(rate),
        }

    def _kl(self) -> Text:
        kl = _number(self._metrics, "policy/kl")
        text = _show(kl, ".2e")
        if self._delta is None:
            return Text(text)
        over = kl is not None and kl > self._delta
        return Text(
            f"{text} {'>' if over else '<=' if kl is not None else '/'} delta {self._delta:.1e}",
            "yellow" if over else "",
        )

    def _time_left(self) -> str:
        done = self._step - self._start
        if done <= 0:
            return "-"
        return _duration((time.monotonic() - self._begun) / done * max(self._max_steps - self._step, 0))

    def _render(self) -> Group:
        head = Table.grid(padding=(0, 2))
        head.add_row(
            Text(f"step {self._step}/{self._max_steps}", "bold"),
            ProgressBar(total=self._max_steps, completed=self._step, width=HISTORY),
            Text(f"{_duration(time.monotonic() - self._begun)} gone, {self._time_left()} left", "dim"),
        )
        body = Table.grid(padding=(0, 3))
        body.add_row(*(Text(name, "dim") for name in METRICS))
        body.add_row(*self._values().values())
        return Group(head, body, Text(f"reward {_sparkline(self._rewards)}", "dim"))


def _number(metrics: Mapping[str, object], name: str) -> float | None:
    value = metrics.get(name)
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _show(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


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
