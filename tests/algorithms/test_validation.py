"""Which weights are the best, and of which sets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from nemo_disco.algorithms import validation
from nemo_disco.evaluation.result import EvaluationResult
from nemo_disco.runtime.rundir import RunDirectory


def test_other_sets_after_a_resume_begin_the_choice_anew(tmp_path: Path, monkeypatch: Any) -> None:
    """... and what was chosen by the old ones is kept beside it."""
    monkeypatch.setattr(validation, "first", lambda call: call())
    run, said = RunDirectory(tmp_path), list[str]()
    journal: Any = SimpleNamespace(run=run, say=said.append)
    unused: Any = None

    def life() -> validation.Validation:
        return validation.Validation(unused, engine=unused, grader=unused, sets=[], journal=journal)

    def result(right: int, questions: str) -> EvaluationResult:
        correct = np.arange(4)[:, None] < right
        lengths = np.ones((4, 1), np.int64)
        return EvaluationResult("set", 0, correct, lengths, ~correct, identity={"questions": questions, "step": right})

    one = life()
    assert one.improved(2, [result(3, "old")]) and not one.improved(3, [result(2, "old")])
    run.best.mkdir()
    (run.best / "weights").write_text("of step 2")

    next_life = life()
    next_life.load_state(one.best)
    assert not next_life.improved(4, [result(3, "old")]) and run.best.is_dir() and not said
    assert next_life.improved(5, [result(1, "new")]), "fewer are right, of other questions"
    assert (tmp_path / "best.step_2/weights").read_text() == "of step 2" and not run.best.exists()
    assert len(said) == 1 and "step 5" in said[0]
    assert not next_life.improved(6, [replace(result(1, "new"), step=6)]) and next_life.improved(7, [result(2, "new")])
