"""A mini-batch whose gradient is not finite is skipped, counted and reported; three in a row end the run, which keeps
its last good checkpoint.

The objective is a user's own. Its token weights overflow float32 in the mini-batches that the environment variable
SPOILED lists, counted from 0.
"""

from __future__ import annotations

import shutil

import pytest
import torch
from commands import QUICKSTART, read_metrics, run_directory
from safetensors.torch import load_file, save_file

MODULE = """
import os
from dataclasses import dataclass
from nemo_disco.algorithms import Objective
from nemo_disco.algorithms.objectives.parameters import parameter

spoiled = {int(n) for n in os.environ["SPOILED"].split(",") if n}
calls = iter(range(1000))

@dataclass(frozen=True, kw_only=True)
class Spoiled(Objective):
    scale: float = parameter(1.0, above=0)

    def value(self, batch):
        huge = 1e300 if next(calls) in spoiled else self.scale
        return huge * (batch.token_mean(batch.log_probs) * (batch.rewards + 0.1)).mean()
"""


@pytest.fixture
def train(commands, tmp_path):
    """A function that trains into `run`; the gradients of the mini-batches that `spoil` lists are not finite."""
    (tmp_path / "mine.py").write_text(MODULE)

    def run_command(run, spoil, *overrides, ranks=1):
        settings = ("algorithm=base", "algorithm.name=mine:Spoiled", "trainer.max_steps=4")
        environment = {"PYTHONPATH": str(tmp_path), "SPOILED": spoil}
        every = "exp_manager.checkpoint_every_n_steps=1"
        return commands("train", *settings, every, *overrides, run_directory(run), ranks=ranks, **environment)

    return run_command


@pytest.mark.parametrize("ranks", [1, 2])
def test_mini_batches_are_skipped_counted_and_reported(ranks, train, tmp_path):
    result = train(tmp_path / "run", "1,4,5", ranks=ranks).ok()  # the second mini-batch of step 1, both of step 3
    lines = read_metrics(tmp_path / "run")
    assert [line["mini_batches/skipped"] for line in lines] == [1, 1, 3, 3]
    assert [line["grad_norm"] is None for line in lines] == [False, False, True, False]
    assert [name for name in lines[0] if name not in lines[2]] == []  # a step without a gradient has the same names
    assert "step 1: a mini-batch was skipped (1 so far): the gradient's norm is " in result.out
    assert "step 3: a mini-batch was skipped (3 so far): " in result.out
    weights = load_file(tmp_path / "run/export/model.safetensors")
    assert all(bool(w.isfinite().all()) for w in weights.values())


def test_three_in_a_row_end_the_run_and_the_last_checkpoint_goes_on(train, tmp_path):
    run = tmp_path / "run"
    result = train(run, "3,4,5")
    assert result.code == 3
    errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in result.err
    assert "step 3: 3 mini-batches in a row had no finite gradient" in errors[0]
    assert f"the last checkpoint, {run}/checkpoints/step_1, " in errors[0]  # step 2 ended in a skipped mini-batch
    assert not (run / "export").exists()
    assert "response" in (run / "rollouts/step_3.jsonl").read_text()  # the failed step's rollouts are there to read
    again = train(run, "").ok()
    assert "resumed from step 1" in again.err
    assert [line["mini_batches/skipped"] for line in read_metrics(run)] == [0, 0, 0, 0]
    weights = load_file(run / "export/model.safetensors")
    assert all(bool(w.isfinite().all()) for w in weights.values())


def test_a_checkpoint_from_which_nothing_can_be_applied_is_suspected(train, tmp_path):
    run = tmp_path / "run"
    train(run, "", "trainer.max_steps=1").ok()
    again = train(run, "0,1,2")
    assert again.code == 3
    assert f"none was applied since {run}/checkpoints/step_1: if that one is at fault, remove it" in again.err


def test_a_save_that_was_put_off_is_made_up_for(train, tmp_path):
    """A save is due after step 2, which ends in a skipped mini-batch; step 3 does not."""
    run = tmp_path / "run"
    train(run, "3,5,6,7", "exp_manager.checkpoint_every_n_steps=2", "exp_manager.keep_checkpoints=9")
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == []
    train(run, "3", "exp_manager.checkpoint_every_n_steps=2", "exp_manager.keep_checkpoints=9").ok()
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_3", "step_4"]


@pytest.mark.parametrize(("questions", "rate"), [(2, "1e30"), (4, "1e4")])
def test_an_update_that_spoils_the_weights_costs_no_checkpoint(questions, rate, commands, tmp_path):
    """questions: of a mini-batch. With 4, a step has one mini-batch, which is applied, so nothing is skipped before
    the save is due; with that learning rate the log-probs stay finite, and only the gradient is not."""
    run = tmp_path / "run"
    often = ("exp_manager.checkpoint_every_n_steps=1", "exp_manager.keep_checkpoints=1", "evaluation.every_n_steps=1")
    some = (
        "evaluation.enabled=true",
        "evaluation.samples=1",
        f"algorithm.mini_batch_questions={questions}",
        run_directory(run),
    )
    commands("train", *often, *some, "trainer.max_steps=2").ok()
    before = modification_times(run, "checkpoints", "best", "export")
    assert any(name.startswith("checkpoints/step_2/") for name in before)
    diverged = commands("train", *often, *some, "trainer.max_steps=8", f"model.optim.lr={rate}")
    assert diverged.code == 3 and "Traceback" not in diverged.err
    assert f"the last checkpoint, {run}/checkpoints/step_2, is from before that and was kept" in diverged.err
    assert modification_times(run, "checkpoints", "best", "export") == before
    assert "resumed from step 2" in commands("train", *often, *some, "trainer.max_steps=3").ok().err


def modification_times(run, *directories):
    """The time in nanoseconds at which each file in these directories of a run was changed."""
    files = (path for name in directories for path in (run / name).rglob("*") if path.is_file())
    return {str(path.relative_to(run)): path.stat().st_mtime_ns for path in files}


@pytest.mark.parametrize(("command", "bad"), [("train", "nan"), ("evaluate", "inf")])
def test_weights_that_are_not_finite_are_refused_by_name(command, bad, commands, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(QUICKSTART / "model", model)
    weights = load_file(model / "model.safetensors")
    name = sorted(weights)[5]
    weights[name].view(-1)[7] = float(bad)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    result = commands(command, f"model.path={model}", run_directory(tmp_path / "run"))
    assert result.code == 2
    assert f"error: model.path={model}: 1 of the {weights[name].numel():,} values of {name} are NaN" in result.err


def test_before_the_first_checkpoint_the_error_says_that_there_is_none(train, tmp_path):
    result = train(tmp_path / "run", "0,1,2", "exp_manager.checkpoint_every_n_steps=9")
    assert result.code == 3
    assert "there is no checkpoint yet" in result.err


def test_a_skipped_mini_batch_changes_nothing(train, tmp_path):
    """Both mini-batches of the only step are skipped, so the exported weights do not depend on the learning rate."""
    train(tmp_path / "a", "0,1", "trainer.max_steps=1").ok()
    train(tmp_path / "b", "0,1", "trainer.max_steps=1", "model.optim.lr=0.1").ok()
    a, b = (load_file(tmp_path / run / "export/model.safetensors") for run in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_what_a_users_objective_gets_wrong_is_named_with_file_and_line(commands, tmp_path):
    (tmp_path / "mine.py").write_text(MODULE.replace("return huge", "return float('nan')"))
    settings = ("algorithm=base", "algorithm.name=mine:Spoiled")
    result = commands("train", *settings, run_directory(tmp_path / "run"), PYTHONPATH=str(tmp_path), SPOILED="")
    assert result.code == 2
    assert result.err.splitlines()[-1].startswith(f"error: objective Spoiled: {tmp_path}/mine.py:")
    assert "Traceback" not in result.err
