"""Accidents of a run's directory: a disk that refuses, a lock that is taken away, links in the way of its files."""

from __future__ import annotations

import errno
import os

import pytest
from commands import at, on_fsync

from nemo_disco.runtime.files import _exchange

EVALUATED = ("evaluation.enabled=true", "evaluation.samples=1", "exp_manager.tensorboard=true")


@pytest.mark.parametrize(
    ("command", "broken", "number", "named"),
    [
        ("train", "/metrics.jsonl", errno.ENOSPC, "metrics.jsonl"),
        ("train", "/rollouts/.step_1.jsonl", errno.EDQUOT, "rollouts/step_1.jsonl"),
        ("train", "/tensorboard/events", errno.EROFS, "tensorboard/events.out.tfevents."),
        ("train", "/.export.tmp", errno.ENOSPC, "export"),
        ("train", "/.report.html", errno.ENOSPC, "report.html"),
        ("evaluate", "/evaluation/test.step_0.samples.jsonl", errno.ENOSPC, "evaluation/test.step_0.samples.jsonl"),
    ],
)
def test_a_disk_that_refuses_is_one_line_with_the_file(command, broken, number, named, commands, tmp_path):
    run = tmp_path / "run"
    broke = on_fsync(tmp_path, broken, f"raise OSError({number}, os.strerror({number}))")  # as the kernel says it
    done = commands(command, *EVALUATED, at(run), **broke)
    assert done.code == 2, done.err
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in done.err
    assert errors[0].startswith(f"error: {run}/{named}")
    assert f"cannot be written: {os.strerror(number)}" in errors[0]


def test_a_directory_that_is_taken_away_ends_the_run_and_stays_anothers(commands, tmp_path):
    run = tmp_path / "run"
    started = commands.start("train", "trainer.max_steps=1000000", at(run), devices=2)
    started.wait_for(run / "rollouts/step_1.jsonl")
    other = tmp_path / "other"
    other.mkdir()
    (other / ".lock").touch()
    assert _exchange(other, run)  # at once, or the run finds no directory for a moment
    done = started.wait()
    assert done.code == 2
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in done.err
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
    done = commands(command, at(run))
    assert done.code == 2 and f"error: {run}/{name}" in done.err and "a symbolic link" in done.err
    assert (tmp_path / "precious").read_text() == "precious"
