"""The real services, offline: the metrics of a run and of its resumption are in W&B's files and in MLflow's store."""

from __future__ import annotations

import json
import time
from pathlib import Path

import mlflow
import pytest
from wandb.proto import wandb_internal_pb2

from nemo_disco.runtime.rundir import RunDirectory
from nemo_disco.runtime.sinks import open_sinks

pytestmark = pytest.mark.sinks
NAN = float("nan")


def train(run: Path, service: str, first: int, last: int, resume: int | None) -> None:
    """Write the metrics of the steps first to last, after a resumption from step `resume`."""
    with open_sinks(RunDirectory(run), resume, [service]) as sinks:
        for step in range(first, last + 1):
            metrics = {"reward/mean": step / 10, "eval/math/pass@1": 0.5, "grad_norm": NAN, "note": "text"}
            for sink in sinks:
                sink.write(step, metrics)


def read_offline_rewards(run: Path) -> dict[int, float]:
    """Rewards by step, read from W&B's files: a header of 7 bytes, then records in a single block, each preceded by
    checksum, length and kind."""
    rewards = {}
    for file in sorted((run / "wandb").glob("offline-run-*/*.wandb")):
        data, at = file.read_bytes(), 7
        assert len(data) < 1 << 15
        while at + 7 <= len(data):
            length = int.from_bytes(data[at + 4 : at + 6], "little")
            record = wandb_internal_pb2.Record.FromString(data[at + 7 : at + 7 + length])
            at += 7 + length
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            if "reward/mean" in items:
                assert items["eval/math/pass@1"] == 0.5 and not {"grad_norm", "note"} & items.keys()
                rewards[int(items["_step"])] = items["reward/mean"]
    return rewards


def test_weights_and_biases_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    train(tmp_path / "run", "wandb", 1, 3, None)
    time.sleep(1.1)  # W&B names its directories by the second
    train(tmp_path / "run", "wandb", 4, 5, 3)
    assert read_offline_rewards(tmp_path / "run") == {step: step / 10 for step in range(1, 6)}


def test_mlflow_in_the_run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = tmp_path / "run"
    train(run, "mlflow", 1, 3, None)
    train(run, "mlflow", 4, 5, 3)
    client = mlflow.MlflowClient(f"sqlite:///{run}/mlflow.db")
    [mlflow_run] = client.search_runs([client.get_experiment_by_name("nemo_disco").experiment_id])
    history = client.get_metric_history(mlflow_run.info.run_id, "reward/mean")
    assert [(m.step, m.value) for m in history] == [(step, step / 10) for step in range(1, 6)]
    assert mlflow_run.data.metrics["eval/math/pass-at-1"] == 0.5 and mlflow_run.info.run_name == "run"
    assert "grad_norm" not in mlflow_run.data.metrics
