"""Killed and started again, a run ends as if nothing had happened: bit for bit, at any layout.

N steps, a kill -9 at a random moment after their checkpoint, and N more, against 2 N steps in one life.
"""

from __future__ import annotations

import math
import random
import shutil
import signal
import time

import pytest
from commands import WHOLE, at, held, metrics
from same_run import assert_same

from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.rundir import RunDirectory


def wait_until_free(run):
    """The ranks die with their launcher, a moment later."""
    deadline = time.monotonic() + 60
    while True:
        try:
            with RunDirectory(run).lock():
                return
        except UserError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_killed_after_a_checkpoint_it_ends_as_one_life_does(finished, commands, tmp_path):
    run = tmp_path / "run"
    # However late the kill comes, it comes before the run has ended.
    held_back = held(tmp_path, "/rollouts/.step_4.jsonl")
    killed = commands.start("train", *WHOLE, at(run), devices=finished.ranks, **held_back)
    killed.wait_for(run / "checkpoints/step_2")
    time.sleep(random.uniform(0, 0.5))
    assert killed.process.poll() is None
    killed.process.kill()
    assert killed.wait().code == -signal.SIGKILL
    wait_until_free(run)
    again = commands("train", *WHOLE, at(run), ranks=finished.ranks).ok()
    assert "resumed from step 2" in again.err and "settings changed" not in again.err
    assert "before and after 4 steps" in again.out
    assert_same(run, finished.path)


@pytest.mark.slow
@pytest.mark.parametrize("finished", [2], indirect=True, ids=["DP2"])
def test_killed_at_any_moment_again_and_again_it_ends_as_one_life_does(finished, commands, tmp_path):
    """Each life is longer than the one before, so that one of them sees the end."""
    overrides = (*WHOLE, "exp_manager.checkpoint_every_n_steps=1", at(tmp_path / "run"))
    codes, life = [], 1.0
    while 0 not in codes:
        codes.append(commands("train", *overrides, ranks=2, life=random.uniform(0.7, 1) * life).code)
        life *= 1.5
        wait_until_free(tmp_path / "run")
    assert set(codes) == {-signal.SIGKILL, 0}
    assert_same(tmp_path / "run", finished.path)


def test_a_finished_run_started_again_has_nothing_to_do(finished, commands, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished.path, run)
    untouched = (run / "export/model.safetensors").stat()
    commands("train", *WHOLE, at(run), ranks=finished.ranks).ok()
    assert (run / "export/model.safetensors").stat().st_ino == untouched.st_ino
    (run / "export/model.safetensors").unlink()
    done = commands("train", *WHOLE, at(run), ranks=finished.ranks).ok()
    assert "step 4 of 4: nothing is left to train" in done.out and f"{run}/export" in done.out
    assert_same(run, finished.path)


def test_a_run_that_is_done_is_not_exported_again_and_says_its_learning_rates(commands, tmp_path):
    """Two mini-batches a step: one of warmup from half the rate, then a cosine over the four that are left."""
    low, high = 1e-5, 4e-4
    schedule = (f"model.optim.lr={high}", "model.optim.sched.warmup_steps=2", f"model.optim.sched.min_lr={low}")
    settings = ("trainer.max_steps=3", *schedule, at(tmp_path))
    commands("train", *settings).ok()
    rates = [high / 2, high * 3 / 4, *(low + (high - low) * (1 + math.cos(math.pi * n / 4)) / 2 for n in range(4))]
    means = [(one + two) / 2 for one, two in zip(rates[::2], rates[1::2], strict=True)]
    assert [line["lr"] for line in metrics(tmp_path)] == pytest.approx(means)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "export").iterdir()}
    commands("train", *settings).ok()
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "export").iterdir()} == before


def test_more_steps_go_on_from_the_last_and_changes_are_said(finished, commands, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished.path, run)
    done = commands("train", *WHOLE, "trainer.max_steps=5", "algorithm=grpo", at(run), ranks=finished.ranks).ok()
    for said in (
        "settings changed since the last start: ",
        "trainer.max_steps: 4 -> 5",
        'algorithm.name: "disco" -> "grpo"',
    ):
        assert said in done.err
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4, 5]
    assert metrics(run)[:4] == metrics(finished.path)


@pytest.mark.parametrize("name", ["__0_0.distcp", "checkpoint.json", ".metadata"])
def test_a_truncated_checkpoint_is_passed_over_for_the_one_before(name, finished, commands, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished.path, run)
    damaged = run / "checkpoints/step_4" / name
    damaged.write_bytes(damaged.read_bytes()[:-100])
    again = commands("train", *WHOLE, at(run), ranks=finished.ranks).ok()
    assert f"damaged checkpoint skipped: {damaged.parent}: {name}" in again.err
    assert "resumed from step 2" in again.err
    assert_same(run, finished.path)


def test_without_an_intact_checkpoint_nothing_is_trained(finished, commands, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished.path, run)
    for n in (2, 4):
        (run / f"checkpoints/step_{n}/__0_0.distcp").write_bytes(b"")
    done = commands("train", *WHOLE, at(run), ranks=finished.ranks)
    assert done.code == 2
    assert f"error: no intact checkpoint in {run}/checkpoints" in done.err
    assert metrics(run) == metrics(finished.path)


def test_killed_in_the_last_evaluation_it_ends_as_one_life_does(finished, commands, tmp_path):
    """Its checkpoint is there, its metrics and export are not."""
    run = tmp_path / "run"
    shutil.copytree(finished.path, run)
    (run / "evaluation/test.step_4.json").unlink()
    shutil.rmtree(run / "export")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:3]))
    done = commands("train", *WHOLE, at(run), ranks=finished.ranks).ok()
    assert "resumed from step 4" in done.err and "before and after 4 steps" in done.out
    assert_same(run, finished.path)


def test_without_its_checkpoints_it_begins_anew_and_nothing_of_the_old_run_passes_for_it(finished, commands, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished.path, run)
    shutil.rmtree(run / "checkpoints")
    done = commands("train", *WHOLE, at(run), ranks=finished.ranks).ok()
    assert f"what another run left there is in {run}/earlier/1" in done.err
    assert_same(run, finished.path)
    assert metrics(run / "earlier/1") == metrics(finished.path)
    assert (run / "earlier/1/export/model.safetensors").exists()


def test_other_questions_are_refused(finished, commands, tmp_path):
    run, other = tmp_path / "run", tmp_path / "train.jsonl"
    shutil.copytree(finished.path, run)
    other.write_text((commands.directory / "train.jsonl").read_text().replace("+", "-"))
    files = f"data.train_files=[{other}]"
    done = commands("train", *WHOLE, "trainer.max_steps=5", files, at(run), ranks=finished.ranks)
    assert done.code == 2 and "data.if_changed=restart" in done.err and len(set(done.err.splitlines())) == 1
    assert metrics(run) == metrics(finished.path)
