"""A resumed run has the same history of metrics as a run that was never stopped."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.rundir import RunDirectory
from nemo_disco.runtime.sinks import JsonlSink, open_sinks


def write_steps(path: Path, steps: range, resume_step: int | None) -> None:
    """Write metrics of these steps, after a resumption from resume_step if it is not None."""
    sink = JsonlSink(path, resume_step)
    for step in steps:
        sink.write(step, {"reward/mean": step / 3, "policy/kl": 0.1 * step})
    sink.close()


def test_resuming_continues_exactly(tmp_path: Path) -> None:
    uninterrupted, resumed = tmp_path / "straight.jsonl", tmp_path / "broken.jsonl"
    write_steps(uninterrupted, range(1, 9), None)
    write_steps(resumed, range(1, 7), None)  # died after step 6; the last checkpoint is of step 4
    write_steps(resumed, range(5, 9), 4)
    assert resumed.read_bytes() == uninterrupted.read_bytes()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_line_torn_by_a_crash_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(1, 4), None)
    with path.open("a") as file:
        file.write('{"step": 4, "reward/me')
    write_steps(path, range(4, 6), 3)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("line", ["[1, 2]", "not json", '{"reward/mean": 1.0}', '"step"'])
def test_a_foreign_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    before = path.read_text()
    with pytest.raises(UserError, match=r"metrics.jsonl: line 2"):
        JsonlSink(path, 3)
    assert path.read_text() == before


def test_a_new_run_begins_a_new_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(1, 4), None)
    write_steps(path, range(1, 2), None)
    assert path.read_text().count("\n") == 1


def test_strict_json_and_every_bit_of_a_float(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.write(
        1,
        {
            "a": float("nan"),
            "b": float("inf"),
            "c": 0.1 + 0.2,
            "step": 99,
            "d": "x\u2028y",
            "e": None,
            "f": True,
            "g": [{"h": float("inf"), "i": 2.5}],
        },
    )
    sink.close()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    (line,) = path.read_text().splitlines()
    record = json.loads(line, parse_constant=refuse)
    assert record == {
        "step": 1,
        "a": None,
        "b": None,
        "c": 0.1 + 0.2,
        "d": "x\u2028y",
        "e": None,
        "f": True,
        "g": [{"h": None, "i": 2.5}],
    }
    assert next(iter(record)) == "step"


def test_a_written_step_survives_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    program = (
        "import os, pathlib, signal; from nemo_disco.runtime.sinks import JsonlSink;"
        f"JsonlSink(pathlib.Path({str(path)!r})).write(1, {{'x': 1.0}}); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -9
    assert json.loads(path.read_text()) == {"step": 1, "x": 1.0}


def test_tensorboard_forgets_the_steps_that_a_resumed_run_repeats(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resume_step, steps, offset in [(None, range(1, 7), 0.0), (4, range(5, 9), 100.0)]:
        with open_sinks(RunDirectory(tmp_path), resume_step) as sinks:
            for step, sink in itertools.product(steps, sinks):
                sink.write(step, {"reward/mean": step + offset, "policy/kl": None, "note": "text"})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["reward/mean"]
    assert [(e.step, e.value) for e in events.Scalars("reward/mean")] == [
        *[(s, float(s)) for s in range(1, 5)],
        *[(s, s + 100.0) for s in range(5, 9)],
    ]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 9))


def test_tensorboard_is_imported_only_when_opened() -> None:
    program = (
        "import sys; import nemo_disco.runtime.sinks; sys.exit('torch' in sys.modules or 'tensorboard' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize("service", ["wandb", "mlflow"])
@pytest.mark.parametrize("content", [b"", b"a/b", b"\xff", b"x" * 65])
def test_a_damaged_id_is_named(service: str, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, service, SimpleNamespace(MlflowClient=str))  # the service is never called
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nowhere")
    (tmp_path / f"{service}.run_id").write_bytes(content)
    with pytest.raises(UserError, match=rf"{service}\.run_id: "):
        open_sinks(RunDirectory(tmp_path), 1, [service]).__enter__()


def test_tensorboard_can_be_off(tmp_path: Path) -> None:
    with open_sinks(RunDirectory(tmp_path), None, also=()) as [sink]:
        sink.write(1, {"x": 1.0})
    assert not (tmp_path / "tensorboard").exists()
