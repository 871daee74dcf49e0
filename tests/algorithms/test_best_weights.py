"""RUN/best has the weights of the highest score on the same evaluation sets, and agrees with the resumed checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_disco.algorithms import best_weights
from nemo_disco.algorithms.best_weights import BestWeights
from nemo_disco.evaluation.result import EvaluationResult
from nemo_disco.runtime.rundir import MODEL_RECORD, RunDirectory


class Run:
    """One life of a run in one process; the exported weights are the text "of step N"."""

    def __init__(self, path: Path) -> None:
        self.run, self.log = RunDirectory(path), list[str]()
        self.best = BestWeights(self.run, self.log.append)

    def evaluate(self, step: int, right: int, saved: int, questions: str = "old") -> None:
        """Evaluate the weights of a step, of whose 4 questions `right` are right; keep them if they are the best.

        saved: the step of the last checkpoint.
        """
        if self.best.consider(step, [result(right, questions)]):
            self.exported_step = step
            self.best.keep(self, saved)  # type: ignore[arg-type]

    def export(self, directory: Path, more_files: dict[str, str]) -> None:
        """Stands in for Policy.export."""
        directory.mkdir(exist_ok=True)
        for name, text in {"weights": f"of step {self.exported_step}", **more_files}.items():
            # As the atomic writer does: a file that is linked elsewhere must not be written into.
            (directory / name).unlink(missing_ok=True)
            (directory / name).write_text(text)

    def resume(self, state: Any, step: int) -> Run:
        """A new life of this run, which begins at the checkpoint of `step` with this state."""
        life = Run(self.run.path)
        life.best.load_state(state, step)
        return life

    @property
    def weights(self) -> str | None:
        """The weights in RUN/best; None if there are none."""
        path = self.run.best / "weights"
        return path.read_text() if path.exists() else None


def result(right: int, questions: str) -> EvaluationResult:
    """An evaluation of 4 questions, of which `right` are right."""
    correct = np.arange(4)[:, None] < right
    lengths = np.ones((4, 1), np.int64)
    return EvaluationResult("set", 0, correct, lengths, ~correct, identity={"questions": questions, "step": right})


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(best_weights, "on_first_rank", lambda call: call())
    return Run(tmp_path)


def test_other_sets_after_a_resume_begin_the_choice_anew(run: Run) -> None:
    """The weights that were the best on the old sets are kept beside RUN/best."""
    run.evaluate(2, 3, saved=0)
    run.evaluate(3, 2, saved=0)
    assert run.weights == "of step 2"
    life = run.resume(run.best.record, 3)
    life.evaluate(4, 3, saved=3)
    assert life.weights == "of step 2" and not life.log
    life.evaluate(5, 1, saved=3, questions="new")
    assert life.weights == "of step 5", "scores on other questions must not be compared, though this one is lower"
    assert (run.run.path / "best.step_2/weights").read_text() == "of step 2"
    assert "step 5: the evaluation sets or settings changed" in life.log[0]
    assert not life.best.consider(6, [replace(result(1, "new"), step=6)]) and life.best.consider(7, [result(2, "new")])


def test_a_life_that_begins_before_the_best_has_the_best_of_its_own_past(run: Run) -> None:
    """Checkpoints at steps 3 and 6; the best were steps 2, 4 and 5, and the life ended before the second checkpoint."""
    run.evaluate(2, 1, saved=0)
    record = run.best.record
    run.best.release(3)
    run.evaluate(4, 2, saved=3)
    run.evaluate(5, 3, saved=3)
    assert run.weights == "of step 5"
    life = run.resume(record, 3)
    assert life.weights == "of step 2" and life.best.record == record
    assert len(life.log) == 1 and "step 5" in life.log[0]
    assert not (run.run.path / "best.before").exists()
    life.evaluate(4, 1, saved=3)
    assert life.weights == "of step 2"
    life.evaluate(5, 2, saved=3)
    assert life.weights == "of step 5"


def test_the_best_of_a_checkpoints_own_step_is_kept_on_resuming(run: Run) -> None:
    """The checkpoint is written before the evaluation, so its state names an earlier best; RUN/best has the record."""
    run.evaluate(2, 1, saved=0)
    record = run.best.record
    run.evaluate(4, 2, saved=4)
    life = run.resume(record, 4)
    assert life.weights == "of step 4" and life.best.record == run.best.record and not life.log


@pytest.mark.parametrize("damage", ["no copy", "no record"])
def test_a_best_that_cannot_be_restored_is_chosen_anew_and_this_is_logged(run: Run, damage: str) -> None:
    run.evaluate(2, 1, saved=0)
    record = run.best.record
    run.best.release(3)
    run.evaluate(4, 2, saved=3)
    (run.run.path / "best.before" / MODEL_RECORD).write_text("{")
    if damage == "no record":
        (run.run.best / MODEL_RECORD).unlink()
    life = run.resume(record, 3)
    assert life.weights is None and life.best.record is None and "chosen anew" in life.log[0]
    assert (run.run.path / "best.unknown/weights").exists() == (damage == "no record")
    life.evaluate(4, 1, saved=3)
    assert life.weights == "of step 4"


def test_nothing_is_left_of_a_lost_life_if_the_weights_before_training_were_the_best(run: Run) -> None:
    run.best.consider(0, [result(1, "old")])
    record = run.best.record
    run.evaluate(2, 2, saved=1)
    life = run.resume(record, 1)
    assert life.weights is None and life.best.record == record and life.log
