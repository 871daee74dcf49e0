"""The training scripts on a real SLURM: over two nodes, beyond a time limit, and as an array of jobs."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from pathlib import Path

import jobs
import pytest
from cluster import Cluster, wait_for
from jobs import TINY, TRAIN, Job, Submit
from safetensors.torch import load_file

pytestmark = pytest.mark.slurm
STEPS = 10
LOGS = ["rank_0.log", "rank_1.log", "rank_2.log", "rank_3.log", "srun.log", "started"]


@pytest.fixture(scope="module")
def uninterrupted_run(slurm: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a job that trained without an interruption."""
    directory = tmp_path_factory.mktemp("uninterrupted")
    arguments = [*TRAIN, f"trainer.max_steps={STEPS}"]
    job = jobs.submit(slurm, directory / "run", "train_one_node.sbatch", arguments, logs=directory)
    assert job.wait_for_end() == "COMPLETED", job.log.read_text()
    return job.run


def assert_same_weights(run: Path, other: Path) -> None:
    """Assert that both runs exported the same weights, and that `run` has the metrics of every step once."""
    weights, expected = (load_file(directory / "export/model.safetensors") for directory in (run, other))
    assert weights.keys() == expected.keys()
    assert [name for name in weights if not weights[name].equal(expected[name])] == []
    history = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert history == list(range(1, STEPS + 1))


def test_two_nodes_train_at_tp_2_dp_2(submit: Submit) -> None:
    job = submit("train_multi_node.sbatch", [*TRAIN, "trainer.max_steps=2"])
    assert job.wait_for_end() == "COMPLETED", job.log.read_text()
    layout = json.loads((job.run / "checkpoints/step_2/checkpoint.json").read_text())["layout"]
    assert (layout["tensor_model_parallel_size"], layout["data_parallel_size"]) == (2, 2)
    assert all(
        math.isfinite(json.loads(line)["grad_norm"]) for line in (job.run / "metrics.jsonl").read_text().splitlines()
    )
    logs = job.run / "logs" / f"{job.id}.0"
    assert sorted(path.name for path in logs.iterdir()) == LOGS
    first_lines = [(logs / f"rank_{rank}.log").read_text().splitlines()[0] for rank in range(4)]
    assert first_lines == [f"rank {rank} of 4 on {node}" for rank, node in enumerate(("n1", "n1", "n2", "n2"))]
    assert "finished: " in job.log.read_text()
    assert not list(job.run.glob(".meeting*"))


def test_a_job_at_its_time_limit_goes_on_and_ends_with_the_same_weights(
    submit: Submit, uninterrupted_run: Path
) -> None:
    arguments = [*TRAIN, f"trainer.max_steps={STEPS}"]
    job = submit("train_one_node.sbatch", arguments, "--signal=B:USR1@180", PACE_S="6")
    job.wait_for_step()
    minutes = int(job.field("RunTime").split(":")[-2])
    # The end is 3 to 4 minutes from here, so the warning comes within a minute, and ten steps of 12 s take longer.
    job.slurm.call("scontrol", "update", f"JobId={job.id}", f"TimeLimit={minutes + 4}")
    wait_for(lambda: job.field("JobState") == "PENDING", seconds=300)
    assert 0 < len((job.run / "metrics.jsonl").read_text().splitlines()) < STEPS
    # Without this, SLURM would wait for two minutes, and warn the second life too.
    job.slurm.call("scontrol", "update", f"JobId={job.id}", "StartTime=now", "TimeLimit=60")
    assert job.wait_for_end() == "COMPLETED", job.log.read_text()
    assert job.field("Restarts") == "1"
    assert f"saved; requeueing job {job.id}" in job.log.read_text()
    assert "resumed from step" in (job.run / "logs" / f"{job.id}.1" / "rank_0.log").read_text()
    assert_same_weights(job.run, uninterrupted_run)


def test_an_array_is_a_chain(submit: Submit, uninterrupted_run: Path, slurm: Cluster, tmp_path: Path) -> None:
    arguments = [*TRAIN, f"trainer.max_steps={STEPS}"]
    array = submit("train_one_node.sbatch", arguments, "--array=1-3%1", PACE_S="4")
    first = Job(f"{array.id}_1", slurm, array.run, array.log)
    first.wait_for_step()
    os.kill(first.script_pid(), signal.SIGUSR1)  # as SLURM warns of the time limit
    for link in (1, 2, 3):
        assert Job(f"{array.id}_{link}", slurm, array.run, array.log).wait_for_end() == "COMPLETED", link
    logs = "".join(path.read_text() for path in sorted(tmp_path.glob("*.log"), key=lambda p: p.stat().st_mtime))
    words = ["saved; the next link goes on", "finished: ", "an earlier link of this chain finished the run"]
    places = [logs.index(word) for word in words]
    assert places == sorted(places)
    assert_same_weights(array.run, uninterrupted_run)


def test_evaluate_and_convert(submit: Submit, uninterrupted_run: Path, tmp_path: Path) -> None:
    arguments = [*TINY, f"model.path={uninterrupted_run}/export", "evaluation.max_questions=4", "evaluation.samples=2"]
    job = submit("evaluate.sbatch", arguments)
    out = tmp_path / "converted"
    assert job.wait_for_end() == "COMPLETED", job.log.read_text()
    assert "test: 4 questions x 2 samples" in job.log.read_text()
    job = submit("convert.sbatch", [f"{uninterrupted_run}/checkpoints/step_{STEPS}", str(out)], "--ntasks-per-node=1")
    assert job.wait_for_end() == "COMPLETED", job.log.read_text()
    weights, expected = (load_file(path / "model.safetensors") for path in (out, uninterrupted_run / "export"))
    assert weights.keys() == expected.keys()
    assert all(weights[name].equal(expected[name]) for name in expected)


def test_a_job_with_too_little_time_for_a_step_fails_and_is_not_requeued(submit: Submit) -> None:
    # The start waits, so that the warning comes before the first step even on a quiet machine.
    short = ("--time=5", "--signal=B:USR1@600")
    job = submit("train_one_node.sbatch", [*TRAIN, "trainer.max_steps=2"], *short, HOLD_START_S="600")
    started = time.monotonic()
    assert job.wait_for_end() == "FAILED"
    assert "error: stopped before one step was saved: it needs more time (--time)" in job.log.read_text()
    assert job.field("Restarts") == "0" and time.monotonic() - started < 120
