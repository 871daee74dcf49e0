"""A run that was killed and started again ends as if it had never stopped, bit for bit, on one rank and on two.

N steps, a kill -9 at a random moment after their checkpoint, and N more are compared with 2 N steps in one life.
"""

from __future__ import annotations

import math
import random
import shutil
import signal
import time

import pytest
from commands import WHOLE_RUN, read_metrics, run_directory, wait_at_fsync
from same_run import assert_same_run

from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.rundir import RunDirectory


def wait_until_free(run):
    """Wait until the run's directory is unlocked: the ranks die a moment after their launcher."""
    deadline = time.monotonic() + 60
    while True:
        try:
            with RunDirectory(run).lock():
                return
        except UserError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_run_killed_after_a_checkpoint_ends_as_one_life_does(finished_run, commands, tmp_path):
    run = tmp_path / "run"
    # However late the kill comes, it comes before the run has ended.
    environment = wait_at_fsync(tmp_path, "/rollouts/.step_4.jsonl")
    command = commands.start("train", *WHOLE_RUN, run_directory(run), devices=finished_run.ranks, **environment)
    command.wait_for(run / "checkpoints/step_2")
    time.sleep(random.uniform(0, 0.5))
    assert command.process.poll() is None
    command.process.kill()
    assert command.wait().code == -signal.SIGKILL
    wait_until_free(run)
    again = commands("train", *WHOLE_RUN, run_directory(run), ranks=finished_run.ranks).ok()
    assert "resumed from step 2" in again.err and "settings changed" not in again.err
    assert "before and after 4 steps" in again.out
    assert_same_run(run, finished_run.path)


@pytest.mark.slow
@pytest.mark.parametrize("finished_run", [2], indirect=True, ids=["DP2"])
def test_a_run_killed_at_any_moment_again_and_again_ends_as_one_life_does(finished_run, commands, tmp_path):
    """Each life is longer than the one before, so that one of them finishes the run."""
    overrides = (*WHOLE_RUN, "exp_manager.checkpoint_every_n_steps=1", run_directory(tmp_path / "run"))
    codes, life = [], 1.0
    while 0 not in codes:
        codes.append(commands("train", *overrides, ranks=2, life=random.uniform(0.7, 1) * life).code)
        life *= 1.5
        wait_until_free(tmp_path / "run")
    assert set(codes) == {-signal.SIGKILL, 0}
    assert_same_run(tmp_path / "run", finished_run.path)


def test_a_finished_run_started_again_has_nothing_to_do(finished_run, commands, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished_run.path, run)
    untouched = (run / "export/model.safetensors").stat()
    commands("train", *WHOLE_RUN, run_directory(run), ranks=finished_run.ranks).ok()
    assert (run / "export/model.safetensors").stat().st_ino == untouched.st_ino
    (run / "export/model.safetensors").unlink()
    result = commands("train", *WHOLE_RUN, run_directory(run), ranks=finished_run.ranks).ok()
    assert "step 4 of 4: nothing is left to train" in result.out and f"{run}/export" in result.out
    assert_same_run(run, finished_run.path)


def test_a_finished_run_is_not_exported_again_and_its_metrics_have_the_learning_rates(commands, tmp_path):
    """Of the six mini-batches, two are warmup, which begins at half the rate; a cosine falls over the other four."""
    low, high = 1e-5, 4e-4
    schedule = (f"model.optim.lr={high}", "model.optim.sched.warmup_steps=2", f"model.optim.sched.min_lr={low}")
    settings = ("trainer.max_steps=3", *schedule, run_directory(tmp_path))
    commands("train", *settings).ok()
    rates = [high / 2, high * 3 / 4, *(low + (high - low) * (1 + math.cos(math.pi * n / 4)) / 2 for n in range(4))]
    means = [(one + two) / 2 for one, two in zip(rates[::2], rates[1::2], strict=True)]
    assert [line["lr"] for line in read_metrics(tmp_path)] == pytest.approx(means)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "export").iterdir()}
    commands("train", *settings).ok()
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "export").iterdir()} == before


def test_more_steps_go_on_from_the_last_and_changed_settings_are_reported(finished_run, commands, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished_run.path, run)
    result = commands(
        "train", *WHOLE_RUN, "trainer.max_steps=5", "algorithm=grpo", run_directory(run), ranks=finished_run.ranks
    ).ok()
    for words in (
        "settings changed since the last start: ",
        "trainer.max_steps: 4 -> 5",
        'algorithm.name: "disco" -> "grpo"',
    ):
        assert words in result.err
    assert [line["step"] for line in read_metrics(run)] == [1, 2, 3, 4, 5]
    assert read_metrics(run)[:4] == read_metrics(finished_run.path)


@pytest.mark.parametrize("name", ["__0_0.distcp", "checkpoint.json", ".metadata"])
def test_a_truncated_checkpoint_is_passed_over_for_the_one_before(name, finished_run, commands, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished_run.path, run)
    damaged = run / "checkpoints/step_4" / name
    damaged.write_bytes(damaged.read_bytes()[:-100])
    again = commands("train", *WHOLE_RUN, run_directory(run), ranks=finished_run.ranks).ok()
    assert f"damaged checkpoint skipped: {damaged.parent}: {name}" in again.err
    assert "resumed from step 2" in again.err
    assert_same_run(run, finished_run.path)


def test_without_an_intact_checkpoint_nothing_is_trained(finished_run, commands, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished_run.path, run)
    for n in (2, 4):
        (run / f"checkpoints/step_{n}/__0_0.distcp").write_bytes(b"")
    result = commands("train", *WHOLE_RUN, run_directory(run), ranks=finished_run.ranks)
    assert result.code == 2
    assert f"error: no intact checkpoint in {run}/checkpoints" in result.err
    assert read_metrics(run) == read_metrics(finished_run.path)


def test_a_run_killed_in_the_last_evaluation_ends_as_one_life_does(finished_run, commands, tmp_path):
    """The last step's checkpoint was saved, but not its metrics, its evaluation and the export."""
    run = tmp_path / "run"
    shutil.copytree(finished_run.path, run)
    (run / "evaluation/test.step_4.json").unlink()
    shutil.rmtree(run / "export")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:3]))
    result = commands("train", *WHOLE_RUN, run_directory(run), ranks=finished_run.ranks).ok()
    assert "resumed from step 4" in result.err and "before and after 4 steps" in result.out
    assert_same_run(run, finished_run.path)


def test_a_run_without_its_checkpoints_begins_anew_and_its_old_files_are_moved(finished_run, commands, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished_run.path, run)
    shutil.rmtree(run / "checkpoints")
    result = commands("train", *WHOLE_RUN, run_directory(run), ranks=finished_run.ranks).ok()
    assert f"files of another run are now in {run}/earlier/1" in result.err
    assert_same_run(run, finished_run.path)
    assert read_metrics(run / "earlier/1") == read_metrics(finished_run.path)
    assert (run / "earlier/1/export/model.safetensors").exists()


def test_other_questions_are_refused(finished_run, commands, tmp_path):
    run, other = tmp_path / "run", tmp_path / "train.jsonl"
    shutil.copytree(finished_run.path, run)
    other.write_text((commands.directory / "train.jsonl").read_text().replace("+", "-"))
    files = f"data.train_files=[{other}]"
    result = commands("train", *WHOLE_RUN, "trainer.max_steps=5", files, run_directory(run), ranks=finished_run.ranks)
    assert result.code == 2 and "data.if_changed=restart" in result.err and len(set(result.err.splitlines())) == 1
    assert read_metrics(run) == read_metrics(finished_run.path)
