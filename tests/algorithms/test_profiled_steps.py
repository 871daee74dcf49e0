"""The profiler captures the chosen steps, whole: the trainer's own order, around parts that do nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from fake_cuda import fake_cuda

from nemo_disco.algorithms import trainer as trainer_module
from nemo_disco.algorithms.trainer import Trainer


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Steps 2 and 3 are chosen."""
    monkeypatch.setattr(trainer_module.dist, "get_rank", lambda: 1)
    made = MagicMock()
    made.step = 0
    made.asynchronous = False
    made.exp_manager.profile_steps = [2, 3]
    made.journal.run.profile = tmp_path
    made._profile_step = lambda: Trainer._profile_step(made)
    made._train_step = lambda: Trainer._train_step(made)
    made._validation_is_due.return_value = False
    made.generate_rollouts.return_value.counts = {}
    made.run_training.return_value = {"policy/noise_floor": 0.0, "groups/mixed": 1.0}
    return made


def test_the_chosen_steps_are_captured_whole_and_no_others(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    said = fake_cuda(monkeypatch)
    for _ in range(4):
        said.append("--")
        assert "time/step" in Trainer.train_step(trainer)
    steps = [[x for x in step.split("\n") if x not in ("", "wait")] for step in "\n".join(said).split("--")[1:]]
    step = ["push step", "push refit", "pop", "pop"]
    seen = ["capture", "trace", *step, "traced", "captured", "written rank_1.json"]
    assert steps == [step, seen, seen, step]


def test_a_step_that_raises_closes_what_it_opened(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    said = fake_cuda(monkeypatch)
    trainer.step = 1
    trainer.run_training.side_effect = RuntimeError("out of memory")
    with pytest.raises(RuntimeError, match="out of memory"):
        Trainer.train_step(trainer)
    assert [x for x in said if x != "wait"] == ["capture", "trace", "push step", "pop", "traced", "captured"]
