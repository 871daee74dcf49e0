"""The profiler captures the chosen steps from beginning to end, in the real trainer with components that do nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from fake_cuda import install_fake_cuda

from nemo_disco.algorithms import trainer as trainer_module
from nemo_disco.algorithms.trainer import Trainer


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A trainer whose components are mocks, on rank 1, with steps 2 and 3 chosen for the profiler."""
    monkeypatch.setattr(trainer_module.dist, "get_rank", lambda: 1)
    trainer = MagicMock()
    trainer.step = 0
    trainer.asynchronous = False
    trainer.exp_manager.profile_steps = [2, 3]
    trainer.journal.run.profile = tmp_path
    trainer._profile_step = lambda: Trainer._profile_step(trainer)
    trainer._train_step = lambda: Trainer._train_step(trainer)
    trainer._validation_is_due.return_value = False
    trainer.generate_rollouts.return_value.counts = {}
    trainer.run_training.return_value = {"policy/noise_floor": 0.0, "groups/mixed": 1.0}
    return trainer


def test_the_chosen_steps_are_captured_whole_and_no_others(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = install_fake_cuda(monkeypatch)
    for _ in range(4):
        calls.append("--")
        assert "time/step" in Trainer.train_step(trainer)
    steps = [[x for x in step.split("\n") if x not in ("", "wait")] for step in "\n".join(calls).split("--")[1:]]
    plain = ["push step", "push refit", "pop", "pop"]
    profiled = ["capture", "trace", *plain, "traced", "captured", "written rank_1.json"]
    assert steps == [plain, profiled, profiled, plain]


def test_a_step_that_raises_closes_what_it_opened(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = install_fake_cuda(monkeypatch)
    trainer.step = 1
    trainer.run_training.side_effect = RuntimeError("out of memory")
    with pytest.raises(RuntimeError, match="out of memory"):
        Trainer.train_step(trainer)
    assert [x for x in calls if x != "wait"] == ["capture", "trace", "push step", "pop", "traced", "captured"]
