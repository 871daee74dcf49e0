"""Sinks of a step's metrics: metrics.jsonl always, TensorBoard by default, other services behind the same protocol.

Only rank 0 opens sinks. Resuming from step n removes the history after n, so that the curves continue without a fork.
TensorBoard is imported when it is opened, never before.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from pydantic import with_config
from typing_extensions import TypedDict

from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.files import AppendedFile, open_regular, write_atomically, writing
from nemo_disco.runtime.rundir import RunDirectory
from nemo_disco.runtime.saved_files import Count, FileError, check_file, read_json_lines, read_text

WANDB_ID, MLFLOW_ID = "wandb.run_id", "mlflow.run_id"
# A list of objects with numbers goes to metrics.jsonl alone.
Value = float | int | bool | str | None | Sequence[Mapping[str, Any]]


@with_config(extra="allow")
class MetricsLine(TypedDict):
    """One line of metrics.jsonl: a step, and its metrics by name."""

    step: Count


class Sink(Protocol):
    """Takes the metrics of one step at a time."""

    def write(self, step: int, metrics: Mapping[str, Value]) -> None:
        """Take one step's metrics; after the return they survive the death of this process."""

    def close(self) -> None:
        """Write buffered metrics and close the sink."""


class JsonlSink:
    """metrics.jsonl: one strict JSON object per step; numbers that are not finite are null, floats keep every bit."""

    def __init__(self, path: Path, resume_step: int | None = None) -> None:
        """Keep the lines up to `resume_step`, drop the later ones; None begins a new file.

        Raises UserError naming a line that is not a metrics line (a last one cut by a crash is dropped).
        """
        exists = os.path.lexists(path)
        if exists:
            check_file(path)
        lines = _lines_up_to(path, resume_step) if exists and resume_step is not None else []
        write_atomically(path, "".join(lines))
        self._file = AppendedFile(path)

    def write(self, step: int, metrics: Mapping[str, Value]) -> None:
        line = {"step": None} | strict_metrics(metrics) | {"step": step}
        self._file.write((json.dumps(line, allow_nan=False) + "\n").encode())

    def close(self) -> None:
        self._file.close()


class TensorBoardSink:
    """tensorboard/: every finite number as a scalar, one event per step.

    Not torch's SummaryWriter: its thread prints a traceback of its own when the disk refuses. Raises UserError if
    TensorBoard is not installed.
    """

    def __init__(self, directory: Path, resume_step: int | None = None) -> None:
        with _importing("TensorBoard", "tensorboard", "tensorboard"):
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog
            from tensorboard.compat.proto.summary_pb2 import Summary
            from tensorboard.summary.writer.record_writer import RecordWriter
        self._event: Any = Event
        self._summary: Any = Summary
        # The name that TensorBoard looks for.
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        with writing(directory):
            directory.mkdir(parents=True, exist_ok=True)
        self._file = AppendedFile(directory / name)
        self._writer: Any = RecordWriter(self._file)
        # TensorBoard hides the events from this step on that an earlier process of the run wrote.
        first = 0 if resume_step is None else resume_step + 1
        self._add(step=first, file_version="brain.Event:2")
        self._add(step=first, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, metrics: Mapping[str, Value]) -> None:
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in _numbers(metrics).items()]
        self._add(step=step, summary=self._summary(value=values))

    def close(self) -> None:
        self._file.close()

    def _add(self, **fields: Any) -> None:
        self._writer.write(self._event(wall_time=time.time(), **fields).SerializeToString())


class WandbSink:
    """Weights & Biases, in the mode of its own variables (WANDB_MODE=offline writes into the run directory).

    A resumed run continues under its id, kept in wandb.run_id; steps beyond the checkpoint that a killed process logged
    stay as they are in W&B. Raises UserError if wandb is not installed.
    """

    def __init__(self, directory: Path, settings: Mapping[str, Any]) -> None:
        """settings: the run's configuration, which W&B shows and compares."""
        with _importing("W&B", "'nemo-disco[wandb]'", "wandb"):
            import wandb
        id_file = directory / WANDB_ID
        identity = _read_id(id_file) if os.path.lexists(id_file) else secrets.token_hex(8)
        write_atomically(id_file, identity + "\n")
        self._run: Any = wandb.init(
            project="nemo_disco",
            name=directory.name,
            id=identity,
            resume="allow",
            dir=str(directory),
            config=dict(settings),
        )

    def write(self, step: int, metrics: Mapping[str, Value]) -> None:
        self._run.log(_numbers(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class MLflowSink:
    """MLflow at MLFLOW_TRACKING_URI; without it, in mlflow.db of the run directory.

    A resumed run continues under its id, kept in mlflow.run_id. Raises UserError if mlflow is not installed.
    """

    def __init__(self, directory: Path) -> None:
        with _importing("MLflow", "'nemo-disco[mlflow]'", "mlflow"):
            import mlflow
        place = os.environ.get("MLFLOW_TRACKING_URI")
        if not place:
            database = directory.resolve() / "mlflow.db"
            os.close(open_regular(database, os.O_RDWR | os.O_CREAT))  # SQLite would follow a link
            place = f"sqlite:///{database}"
        self._client: Any = mlflow.MlflowClient(place)
        id_file = directory / MLFLOW_ID
        if os.path.lexists(id_file):
            self._id = _read_id(id_file)
        else:
            experiment = self._client.get_experiment_by_name("nemo_disco")
            number = experiment.experiment_id if experiment else self._client.create_experiment("nemo_disco")
            self._id = self._client.create_run(number, run_name=directory.name).info.run_id
            write_atomically(id_file, self._id + "\n")

    def write(self, step: int, metrics: Mapping[str, Value]) -> None:
        for name, value in _numbers(metrics).items():
            self._client.log_metric(self._id, name.replace("@", "-at-"), value, step=step)  # MLflow knows no @

    def close(self) -> None:
        self._client.set_terminated(self._id)


@contextmanager
def open_sinks(
    run: RunDirectory,
    resume_step: int | None = None,
    also: Sequence[str] = ("tensorboard",),
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> Iterator[list[Sink]]:
    """The sinks of a run, closed at the exit: metrics.jsonl, and those in `also` (tensorboard, wandb, mlflow).

    resume_step: the step of the checkpoint from which the run resumes; None is a new run. settings: its configuration.
    """
    makers: dict[str, Callable[[], Sink]] = {
        "jsonl": lambda: JsonlSink(run.metrics, resume_step),
        "tensorboard": lambda: TensorBoardSink(run.tensorboard, resume_step),
        "wandb": lambda: WandbSink(run.path, settings),
        "mlflow": lambda: MLflowSink(run.path),
    }
    with ExitStack() as stack:
        yield [stack.enter_context(closing(makers[name]())) for name in ("jsonl", *also)]


@contextmanager
def _importing(name: str, package: str, key: str) -> Iterator[None]:
    """Turn an ImportError of this block into a UserError. key: of exp_manager, to turn the sink off."""
    try:
        yield
    except ImportError as error:
        raise UserError(
            f"{name} cannot be imported ({error}): pip install {package}, or exp_manager.{key}=false"
        ) from error


def _read_id(path: Path) -> str:
    """Read the id that the run has at a service. Raises FileError."""
    identity = read_text(path, 100).strip()
    if not re.fullmatch(r"[0-9A-Za-z_-]{1,64}", identity):
        raise FileError(path, "damaged: not the id of a run; remove it, and the service begins another run")
    return identity


def _numbers(metrics: Mapping[str, Value]) -> dict[str, float]:
    """The metrics that are finite numbers."""
    strict = strict_metrics(metrics).items()
    return {name: value for name, value in strict if name != "step" and isinstance(value, (bool, int, float))}


def strict_metrics(metrics: Mapping[str, Value]) -> dict[str, Value]:
    """Metrics as strict JSON values: null for a number that is not finite."""
    return {name: _strict(value) for name, value in metrics.items()}


def _strict(value: Value) -> Value:
    """The value with null for NaN and infinities, which JSON lacks."""
    if isinstance(value, (list, tuple)):
        return [{name: _strict(part) for name, part in entry.items()} for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _lines_up_to(path: Path, step: int) -> list[str]:
    """The complete lines of the file whose step is at most `step`."""
    lines = []
    for line in read_json_lines(path, MetricsLine):
        if not line.raw.endswith(b"\n"):
            break  # cut by a crash
        if line.fault:
            problem = f"line {line.number} is not a metrics line ({line.fault}); mend or move the file before resuming"
            raise FileError(path, problem)
        if line.value["step"] <= step:
            lines.append(line.raw.decode())
    return lines
