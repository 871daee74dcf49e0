"""A gradient that is not finite is skipped, counted and said; three in a row end the run, which keeps what was good.

The objective is a user's own, whose weights overflow float32 in the mini-batches that SPOILED names, counted from 0.
"""

from __future__ import annotations

import shutil

import pytest
import torch
from commands import QUICKSTART, at, metrics
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
def spoiled(commands, tmp_path):
    (tmp_path / "mine.py").write_text(MODULE)

    def train(run, spoil, *overrides, ranks=1):
        mine = ("algorithm=base", "algorithm.name=mine:Spoiled", "trainer.max_steps=4")
        environment = {"PYTHONPATH": str(tmp_path), "SPOILED": spoil}
        every = "exp_manager.checkpoint_every_n_steps=1"
        return commands("train", *mine, every, *overrides, at(run), ranks=ranks, **environment)

    return train


@pytest.mark.parametrize("ranks", [1, 2])
def test_mini_batches_are_skipped_counted_and_said(ranks, spoiled, tmp_path):
    done = spoiled(tmp_path / "run", "1,4,5", ranks=ranks).ok()  # two a step: the first's second, both of the third
    lines = metrics(tmp_path / "run")
    assert [line["mini_batches/skipped"] for line in lines] == [1, 1, 3, 3]
    assert [line["grad_norm"] is None for line in lines] == [False, False, True, False]
    assert [name for name in lines[0] if name not in lines[2]] == []  # a step without a gradient has the same names
    assert "step 1: a mini-batch was skipped (1 so far): the gradient's norm is " in done.out
    assert "step 3: a mini-batch was skipped (3 so far): " in done.out
    weights = load_file(tmp_path / "run/export/model.safetensors")
    assert all(bool(w.isfinite().all()) for w in weights.values())


def test_three_in_a_row_end_the_run_and_the_last_checkpoint_goes_on(spoiled, tmp_path):
    run = tmp_path / "run"
    done = spoiled(run, "3,4,5")
    assert done.code == 2
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in done.err
    assert "step 3: 3 mini-batches in a row had no finite gradient" in errors[0]
    assert f"the last checkpoint, {run}/checkpoints/step_1, " in errors[0]  # step 2 ended in a skipped mini-batch
    assert not (run / "export").exists()
    assert "response" in (run / "rollouts/step_3.jsonl").read_text()  # of the step that failed, to read
    again = spoiled(run, "").ok()
    assert "resumed from step 1" in again.err
    assert [line["mini_batches/skipped"] for line in metrics(run)] == [0, 0, 0, 0]
    weights = load_file(run / "export/model.safetensors")
    assert all(bool(w.isfinite().all()) for w in weights.values())


def test_a_checkpoint_from_which_nothing_can_be_applied_is_suspected(spoiled, tmp_path):
    run = tmp_path / "run"
    spoiled(run, "", "trainer.max_steps=1").ok()
    again = spoiled(run, "0,1,2")
    assert again.code == 2
    assert f"none was applied since {run}/checkpoints/step_1: if that one is at fault, remove it" in again.err


def test_a_save_that_was_put_off_is_made_up_for(spoiled, tmp_path):
    """Step 2, whose turn it is, ends in a skipped mini-batch, step 3 does not."""
    run = tmp_path / "run"
    spoiled(run, "3,5,6,7", "exp_manager.checkpoint_every_n_steps=2", "exp_manager.keep_checkpoints=9")
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == []
    spoiled(run, "3", "exp_manager.checkpoint_every_n_steps=2", "exp_manager.keep_checkpoints=9").ok()
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_3", "step_4"]


@pytest.mark.parametrize(("questions", "rate"), [(2, "1e30"), (4, "1e4")])
def test_an_update_that_spoils_the_weights_costs_no_checkpoint(questions, rate, commands, tmp_path):
    """questions: of a mini-batch. With 4, a step's only one is applied and nothing is skipped before it is saved; at
    that rate its log-probs are finite, and the gradient alone is not."""
    run = tmp_path / "run"
    often = ("exp_manager.checkpoint_every_n_steps=1", "exp_manager.keep_checkpoints=1", "evaluation.every_n_steps=1")
    some = ("evaluation.enabled=true", "evaluation.samples=1", f"algorithm.mini_batch_questions={questions}", at(run))
    commands("train", *often, *some, "trainer.max_steps=2").ok()
    before = files(run, "checkpoints", "best", "export")
    assert any(name.startswith("checkpoints/step_2/") for name in before)
    diverged = commands("train", *often, *some, "trainer.max_steps=8", f"model.optim.lr={rate}")
    assert diverged.code == 2 and "Traceback" not in diverged.err
    assert f"the last checkpoint, {run}/checkpoints/step_2, is from before that and was kept" in diverged.err
    assert files(run, "checkpoints", "best", "export") == before
    assert "resumed from step 2" in commands("train", *often, *some, "trainer.max_steps=3").ok().err


def files(run, *directories):
    found = (path for name in directories for path in (run / name).rglob("*") if path.is_file())
    return {str(path.relative_to(run)): path.stat().st_mtime_ns for path in found}


@pytest.mark.parametrize(("command", "bad"), [("train", "nan"), ("evaluate", "inf")])
def test_weights_that_are_not_finite_are_refused_by_name(command, bad, commands, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(QUICKSTART / "model", model)
    weights = load_file(model / "model.safetensors")
    name = sorted(weights)[5]
    weights[name].view(-1)[7] = float(bad)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    done = commands(command, f"model.path={model}", at(tmp_path / "run"))
    assert done.code == 2
    assert f"error: model.path={model}: 1 of the {weights[name].numel():,} values of {name} are NaN" in done.err


def test_before_the_first_checkpoint_it_says_that_there_is_none(spoiled, tmp_path):
    done = spoiled(tmp_path / "run", "0,1,2", "exp_manager.checkpoint_every_n_steps=9")
    assert done.code == 2
    assert "there is no checkpoint yet" in done.err


def test_a_skipped_mini_batch_changes_nothing(spoiled, tmp_path):
    """All of the first step are skipped: its checkpoint holds the weights and the optimizer of the start."""
    spoiled(tmp_path / "a", "0,1", "trainer.max_steps=1").ok()
    spoiled(tmp_path / "b", "0,1", "trainer.max_steps=1", "model.optim.lr=0.1").ok()
    a, b = (load_file(tmp_path / run / "export/model.safetensors") for run in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_what_a_users_objective_gets_wrong_is_named_with_file_and_line(commands, tmp_path):
    (tmp_path / "mine.py").write_text(MODULE.replace("return huge", "return float('nan')"))
    mine = ("algorithm=base", "algorithm.name=mine:Spoiled")
    done = commands("train", *mine, at(tmp_path / "run"), PYTHONPATH=str(tmp_path), SPOILED="")
    assert done.code == 2
    assert done.err.splitlines()[-1].startswith(f"error: objective Spoiled: {tmp_path}/mine.py:")
    assert "Traceback" not in done.err
