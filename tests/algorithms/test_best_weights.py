"""The choice of the best weights, on the same sets alone, and a RUN/best that agrees with the resumed checkpoint."""

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
    """A run of one process whose weights say of which step they are."""

    def __init__(self, path: Path) -> None:
        self.run, self.said = RunDirectory(path), list[str]()
        self.best = BestWeights(self.run, self.said.append)

    def step(self, step: int, right: int, saved: int, questions: str = "old") -> None:
        """Evaluated after `step`, where the last checkpoint is of `saved`."""
        if self.best.consider(step, [result(right, questions)]):
            self.exports = step
            self.best.keep(self, saved)  # type: ignore[arg-type]

    def export(self, directory: Path, also: dict[str, str]) -> None:
        directory.mkdir(exist_ok=True)
        for name, text in {"weights": f"of step {self.exports}", **also}.items():
            (directory / name).unlink(missing_ok=True)  # as the atomic writer does, which writes new files
            (directory / name).write_text(text)

    def resumed(self, state: Any, step: int) -> Run:
        life = Run(self.run.path)
        life.best.load_state(state, step)
        return life

    @property
    def weights(self) -> str | None:
        path = self.run.best / "weights"
        return path.read_text() if path.exists() else None


def result(right: int, questions: str) -> EvaluationResult:
    correct = np.arange(4)[:, None] < right
    lengths = np.ones((4, 1), np.int64)
    return EvaluationResult("set", 0, correct, lengths, ~correct, identity={"questions": questions, "step": right})


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(best_weights, "first", lambda call: call())
    return Run(tmp_path)


def test_other_sets_after_a_resume_begin_the_choice_anew(run: Run) -> None:
    """... and what was chosen by the old ones is kept beside it."""
    run.step(2, 3, saved=0)
    run.step(3, 2, saved=0)
    assert run.weights == "of step 2"
    life = run.resumed(run.best.record, 3)
    life.step(4, 3, saved=3)
    assert life.weights == "of step 2" and not life.said
    life.step(5, 1, saved=3, questions="new")
    assert life.weights == "of step 5", "fewer are right, of other questions"
    assert (run.run.path / "best.step_2/weights").read_text() == "of step 2"
    assert "step 5: the evaluation sets or settings changed" in life.said[0]
    assert not life.best.consider(6, [replace(result(1, "new"), step=6)]) and life.best.consider(7, [result(2, "new")])


def test_a_life_that_begins_before_the_best_has_the_best_of_its_own_past(run: Run) -> None:
    """Checkpoints at steps 3 and 6; the best were steps 2, 4 and 5, and the life ended before the second checkpoint."""
    run.step(2, 1, saved=0)
    known = run.best.record
    run.best.release(3)
    run.step(4, 2, saved=3)
    run.step(5, 3, saved=3)
    assert run.weights == "of step 5"
    life = run.resumed(known, 3)
    assert life.weights == "of step 2" and life.best.record == known
    assert len(life.said) == 1 and "step 5" in life.said[0]
    assert not (run.run.path / "best.before").exists()
    life.step(4, 1, saved=3)
    assert life.weights == "of step 2"
    life.step(5, 2, saved=3)
    assert life.weights == "of step 5"


def test_a_checkpoint_knows_of_the_best_of_its_own_step(run: Run) -> None:
    """It is written before the evaluation, so that its state does not."""
    run.step(2, 1, saved=0)
    known = run.best.record
    run.step(4, 2, saved=4)
    life = run.resumed(known, 4)
    assert life.weights == "of step 4" and life.best.record == run.best.record and not life.said


@pytest.mark.parametrize("damage", ["no copy", "no record"])
def test_a_best_that_cannot_be_had_again_is_chosen_anew_and_this_is_said(run: Run, damage: str) -> None:
    run.step(2, 1, saved=0)
    known = run.best.record
    run.best.release(3)
    run.step(4, 2, saved=3)
    (run.run.path / "best.before" / MODEL_RECORD).write_text("{")
    if damage == "no record":
        (run.run.best / MODEL_RECORD).unlink()
    life = run.resumed(known, 3)
    assert life.weights is None and life.best.record is None and "chosen anew" in life.said[0]
    assert (run.run.path / "best.unknown/weights").exists() == (damage == "no record")
    life.step(4, 1, saved=3)
    assert life.weights == "of step 4"


def test_where_the_weights_before_training_are_the_best_nothing_is_left_of_a_lost_life(run: Run) -> None:
    run.best.consider(0, [result(1, "old")])
    known = run.best.record
    run.step(2, 2, saved=1)
    life = run.resumed(known, 1)
    assert life.weights is None and life.best.record == known and life.said
