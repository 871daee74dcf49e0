"""Files that an earlier process wrote beyond the step from which a run resumes are set aside."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_disco.evaluation.result import evaluation_file, file_stem
from nemo_disco.runtime.earlier_life import set_aside
from nemo_disco.runtime.rundir import MODEL_RECORD, RunDirectory


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """The directory of a run of ten steps, evaluated before the first step and after each fifth."""
    run = RunDirectory(tmp_path / "run")
    run.create()
    run.metrics.write_text("".join(f'{{"step": {n}}}\n' for n in range(1, 11)))
    for n in range(1, 11):
        run.rollout_file(n).write_text("{}\n")
    for n in (0, 5, 10):
        for name in ("test", "old.set"):
            (run.evaluation / f"{name}.step_{n}.json").write_text("{}")
    (run.evaluation / "test.step_10.samples.jsonl").write_text("{}")
    for name in ("wandb.run_id", "notes.txt", "config.yaml"):
        (run.path / name).write_text(name)
    for directory in (run.best, run.export):
        directory.mkdir()
        (directory / "model.safetensors").write_text("weights")
    return run


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_without_a_checkpoint_all_files_are_moved_and_none_is_lost(run: RunDirectory) -> None:
    """An evaluation of the weights before training stays if its set is evaluated again."""
    before = {path.name for path in run.path.rglob("*") if path.is_file()}
    line = set_aside(run, 0, ["test"])
    assert "earlier/1" in line and "step 0" in line
    assert names(run.evaluation) == {"test.step_0.json"} and not names(run.rollouts)
    assert names(run.path) == {"earlier", "evaluation", "rollouts", "tensorboard", "checkpoints", "notes.txt"}
    assert {path.name for path in run.path.rglob("*") if path.is_file()} == before
    assert (run.path / "earlier/1/best/model.safetensors").read_text() == "weights"
    assert set_aside(run, 0, ["test"]) == ""
    run.metrics.write_text('{"step": 1}\n')
    assert "earlier/2" in set_aside(run, 0, ["test"])


def test_an_evaluation_before_training_stays_whatever_the_name_of_its_set(run: RunDirectory) -> None:
    path = evaluation_file(run.evaluation, "AIME 2024", 0)
    path.write_text("{}")
    set_aside(run, 0, [file_stem("AIME 2024")])
    assert names(run.evaluation) == {path.name}


def test_files_beyond_a_checkpoint_are_removed_and_reported(run: RunDirectory) -> None:
    line = set_aside(run, 6, ["test"])
    assert names(run.rollouts) == {f"step_{n}.jsonl" for n in range(1, 7)}
    assert names(run.evaluation) == {f"{name}.step_{n}.json" for name in ("test", "old.set") for n in (0, 5)}
    assert "step 6" in line and "old.set.step_10.json" in line
    assert names(run.best) == {"model.safetensors"} and set_aside(run, 6, ["test"]) == ""


def test_an_export_of_a_later_step_is_moved_away_and_nothing_else(run: RunDirectory) -> None:
    """The run's last checkpoints are gone, so the export is not the model of the step at which this life begins."""
    (run.export / MODEL_RECORD).write_text('{"step": 10}')
    assert "earlier" not in set_aside(run, 10, ["test"]) and run.export.is_dir()
    assert f"it is now {run.path}/earlier/1/export" in set_aside(run, 6, ["test"])
    assert not run.export.exists() and names(run.path / "earlier/1/export") == {"model.safetensors", MODEL_RECORD}
