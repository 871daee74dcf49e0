"""The services for real, offline: what a run and its resumed life log is in W&B's file and in MLflow's store."""

from __future__ import annotations

import re
from pathlib import Path

import mlflow
import pytest

from nemo_disco.runtime.sinks import open_sinks

pytestmark = pytest.mark.sinks
NAN = float("nan")


def train(run: Path, service: str, first: int, last: int, resume: int | None) -> None:
    with open_sinks(run, resume, [service]) as sinks:
        for step in range(first, last + 1):
            metrics = {"reward/mean": step / 10, "eval/math/pass@1": 0.5, "grad_norm": NAN, "note": "text"}
            sinks.write(step, metrics)


# A history record of W&B's file: fields that are key and JSON value.
HISTORY = re.compile(
    rb"reward/mean\x82\x01.([0-9.]+)\n.{0,3}eval/math/pass@1\x82\x01\x030.5\n.*?_step\x82\x01.(\d+)", re.DOTALL
)


def logged_offline(run: Path) -> dict[int, float]:
    files = sorted((run / "wandb").glob("offline-run-*/*.wandb"))
    content = b"".join(file.read_bytes() for file in files)
    return {int(step): float(value) for value, step in HISTORY.findall(content)}


def test_weights_and_biases_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    train(tmp_path / "run", "wandb", 1, 3, None)
    train(tmp_path / "run", "wandb", 4, 5, 3)
    assert logged_offline(tmp_path / "run") == {step: step / 10 for step in range(1, 6)}


def test_mlflow_in_the_run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = tmp_path / "run"
    train(run, "mlflow", 1, 3, None)
    train(run, "mlflow", 4, 5, 3)
    client = mlflow.MlflowClient(f"sqlite:///{run}/mlflow.db")
    [one] = client.search_runs([client.get_experiment_by_name("nemo_disco").experiment_id])
    history = client.get_metric_history(one.info.run_id, "reward/mean")
    assert [(m.step, m.value) for m in history] == [(step, step / 10) for step in range(1, 6)]
    assert one.data.metrics["eval/math/pass-at-1"] == 0.5 and one.info.run_name == "run"
    assert "grad_norm" not in one.data.metrics
