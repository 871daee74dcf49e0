"""Accidents of a run's directory: a disk that refuses to write, a replaced lock, and links in place of its files."""

from __future__ import annotations

import errno
import os

import pytest
from commands import act_at_fsync, run_directory

from nemo_disco.runtime.files import _exchange

WITH_EVALUATION = ("evaluation.enabled=true", "evaluation.samples=1", "exp_manager.tensorboard=true")


@pytest.mark.parametrize(
    ("command", "file", "number", "name"),
    [
        ("train", "/metrics.jsonl", errno.ENOSPC, "metrics.jsonl"),
        ("train", "/rollouts/.step_1.jsonl", errno.EDQUOT, "rollouts/step_1.jsonl"),
        ("train", "/tensorboard/events", errno.EROFS, "tensorboard/events.out.tfevents."),
        ("train", "/.export.tmp", errno.ENOSPC, "export"),
        ("train", "/.report.html", errno.ENOSPC, "report.html"),
        ("evaluate", "/evaluation/test.step_0.samples.jsonl", errno.ENOSPC, "evaluation/test.step_0.samples.jsonl"),
    ],
)
def test_a_disk_that_refuses_to_write_is_one_line_with_the_file(command, file, number, name, commands, tmp_path):
    run = tmp_path / "run"
    # The error of number `number` is raised as the kernel would report it.
    environment = act_at_fsync(tmp_path, file, f"raise OSError({number}, os.strerror({number}))")
    result = commands(command, *WITH_EVALUATION, run_directory(run), **environment)
    assert result.code == 2, result.err
    errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in result.err
    assert errors[0].startswith(f"error: {run}/{name}")
    assert f"cannot be written: {os.strerror(number)}" in errors[0]


def test_a_directory_that_is_replaced_ends_the_run_which_leaves_the_new_one_alone(commands, tmp_path):
    run = tmp_path / "run"
    command = commands.start("train", "trainer.max_steps=1000000", run_directory(run), devices=2)
    command.wait_for(run / "rollouts/step_1.jsonl")
    other = tmp_path / "other"
    other.mkdir()
    (other / ".lock").touch()
    assert _exchange(other, run)  # in one operation, or the run would find no directory for a moment
    result = command.wait()
    assert result.code == 2
    errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in result.err
    assert errors[0].startswith(f"error: {run}/.lock, by which this run holds its directory, was replaced")
    assert [path.name for path in run.iterdir()] == [".lock"] and not (run / ".lock").read_text()


@pytest.mark.parametrize(
    ("command", "name"), [("train", ".lock"), ("evaluate", "evaluation/test.step_0.samples.jsonl")]
)
def test_what_a_link_points_at_is_left_alone(command, name, commands, tmp_path):
    run = tmp_path / "run"
    (run / name).parent.mkdir(parents=True)
    (tmp_path / "precious").write_text("precious")
    (run / name).symlink_to(tmp_path / "precious")
    result = commands(command, run_directory(run))
    assert result.code == 2 and f"error: {run}/{name}" in result.err and "a symbolic link" in result.err
    assert (tmp_path / "precious").read_text() == "precious"
