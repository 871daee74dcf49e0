"""Where a step's metrics go: metrics.jsonl always, TensorBoard by default; other services behind the same protocol.

Only rank 0 opens sinks. Resuming from step n makes the history end at n, so that the curves go on without a fork.
TensorBoard is imported when it is opened, never before.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.rundir import RunDirectory, write_atomically

Value = float | int | bool | str | None


class Sink(Protocol):
    """What takes the metrics of one step at a time. `resume_step` is a matter of its constructor."""

    def write(self, step: int, metrics: Mapping[str, Value]) -> None:
        """Take one step's metrics; when it returns, they survive the death of this process."""
        ...

    def close(self) -> None:
        """Write what is left and let go."""
        ...


class JsonlSink:
    """metrics.jsonl: one strict JSON object a step; what is not finite is null, floats keep every bit."""

    def __init__(self, path: Path, resume_step: int | None = None) -> None:
        """Keep the lines up to `resume_step`, drop the later ones; None begins a new file.

        Raises UserError naming a line that is not a metrics line (a last one torn by a crash is just dropped).
        """
        kept = _lines_up_to(path, resume_step) if resume_step is not None and path.exists() else []
        write_atomically(path, "".join(kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, Value]) -> None:
        line = {"step": step} | {name: _strict(value) for name, value in metrics.items() if name != "step"}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class TensorBoardSink:
    """tensorboard/: every finite number as a scalar. Raises UserError if TensorBoard is not installed."""

    def __init__(self, directory: Path, resume_step: int | None = None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                f"TensorBoard cannot be imported ({error}): pip install tensorboard, or exp_manager.tensorboard=false"
            ) from error
        # Everything from purge_step on, left by an earlier life of the run, disappears from the curves.
        first = 0 if resume_step is None else resume_step + 1
        self._writer: Any = SummaryWriter(str(directory), purge_step=first)

    def write(self, step: int, metrics: Mapping[str, Value]) -> None:
        for name, value in metrics.items():
            if name != "step" and isinstance(_strict(value), (bool, int, float)):
                self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Sinks:
    """Several sinks as one."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = tuple(sinks)

    def write(self, step: int, metrics: Mapping[str, Value]) -> None:
        for sink in self._sinks:
            sink.write(step, metrics)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()

    def __enter__(self) -> Sinks:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()


def open_sinks(run_dir: RunDirectory | Path, resume_step: int | None = None, tensorboard: bool = True) -> Sinks:
    """The sinks of a run. resume_step: the step of the checkpoint that the run goes on from; None is a new run."""
    run = run_dir if isinstance(run_dir, RunDirectory) else RunDirectory(run_dir)
    sinks: list[Sink] = [JsonlSink(run.metrics, resume_step)]
    if tensorboard:
        sinks.append(TensorBoardSink(run.tensorboard, resume_step))
    return Sinks(sinks)


def _strict(value: Value) -> Value:
    """JSON has neither NaN nor infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _lines_up_to(path: Path, step: int) -> list[str]:
    """The complete lines of the file whose step is at most `step`."""
    with path.open(encoding="utf-8") as file:
        lines = list(file)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    kept = []
    for number, line in enumerate(lines, start=1):
        try:
            line_step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}: line {number} is not a metrics line; mend or move the file before resuming"
            ) from error
        if line_step <= step:
            kept.append(line)
    return kept
