"""The directories that model.path may name in an evaluation, and the model and checkpoint that are then evaluated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_disco.config.compose import compose, to_yaml
from nemo_disco.models.source import model_source
from nemo_disco.runtime.errors import UserError


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Directory of a run of some/model with (empty) checkpoints of steps 2 and 10."""
    for step in (2, 10):
        directory = tmp_path / f"run/checkpoints/step_{step}"
        directory.mkdir(parents=True)
        (directory / "checkpoint.json").write_text(json.dumps({"step": step}))
    (tmp_path / "run/config.yaml").write_text(to_yaml(compose("quickstart", ["model.path=some/model"])))
    return tmp_path / "run"


def test_a_run_is_its_newest_checkpoint_and_a_checkpoint_itself(run: Path) -> None:
    assert model_source(str(run)) == ("some/model", run / "checkpoints/step_10", 10)
    assert model_source(str(run / "checkpoints/step_2")) == ("some/model", run / "checkpoints/step_2", 2)


def test_a_checkpoint_that_a_killed_run_left_under_another_name_counts(run: Path) -> None:
    newest = run / "checkpoints/step_10"
    newest.rename(f"{newest}.replaced")
    assert model_source(str(run)).checkpoint == Path(f"{newest}.replaced")
    newest.mkdir()
    (newest / "checkpoint.json").write_text('{"step": 10}')
    assert model_source(str(run)).checkpoint == newest


def test_any_other_directory_is_a_hugging_face_one(tmp_path: Path) -> None:
    assert model_source(str(tmp_path)) == (str(tmp_path), None, 0)


def test_a_converted_checkpoint_carries_its_model_along(run: Path) -> None:
    (run / "checkpoints/step_2/hugging_face").mkdir()
    assert model_source(str(run / "checkpoints/step_2")).hugging_face == f"{run}/checkpoints/step_2/hugging_face"


def test_paths_that_cannot_be_evaluated_are_refused(run: Path, tmp_path: Path) -> None:
    lonely = tmp_path / "lonely"
    (run / "checkpoints/step_2").rename(lonely)
    with pytest.raises(UserError, match="says which model"):
        model_source(str(lonely))
    (lonely / "checkpoint.json").write_text("{")
    with pytest.raises(UserError, match=r"checkpoint\.json: not valid JSON"):
        model_source(str(lonely))
    (run / "checkpoints").rename(tmp_path / "gone")
    with pytest.raises(UserError, match="without a checkpoint"):
        model_source(str(run))
