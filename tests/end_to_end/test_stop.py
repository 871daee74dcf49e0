"""A run that gets a signal to stop saves and ends with success; one that loses a rank ends at once and names it."""

from __future__ import annotations

import os
import re
import signal
import threading
import time

import psutil
import pytest
from commands import WHOLE_RUN, read_metrics, run_directory, wait_at_fsync
from same_run import assert_same_run

from nemo_disco.runtime.files import _exchange

FOREVER = ("trainer.max_steps=1000000",)


def find_ranks(command):
    """The processes of the ranks that a command started itself, by rank."""
    children = psutil.Process(command.process.pid).children()
    return {int(c.environ()["RANK"]): c for c in children if "RANK" in c.environ()}


def test_a_signal_saves_the_step_and_the_next_life_ends_as_one(finished_run, commands, tmp_path):
    """With two ranks the signal is SIGHUP, which the launcher gets when its terminal is closed."""
    run = tmp_path / "run"
    number = signal.SIGTERM if finished_run.ranks == 1 else signal.SIGHUP
    never = "exp_manager.checkpoint_every_n_steps=1000"  # so that only the signal causes a save
    # However late the signal comes, it comes before the last step.
    environment = wait_at_fsync(tmp_path, "/rollouts/.step_2.jsonl")
    command = commands.start("train", *WHOLE_RUN, never, run_directory(run), devices=finished_run.ranks, **environment)
    command.wait_for(run / "rollouts/step_1.jsonl")
    command.process.send_signal(number)
    (tmp_path / "go").touch()
    result = command.wait().ok()
    match = re.search(rf"asked to stop by {number.name}: saved step (\d)", result.out)
    assert match is not None, result.out
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step_{match[1]}"]
    assert len(read_metrics(run)) == int(match[1]) < 4
    assert not (run / "export").exists()
    commands("train", *WHOLE_RUN, run_directory(run), ranks=finished_run.ranks).ok()
    assert_same_run(run, finished_run.path)


@pytest.mark.parametrize("command", ["train", "evaluate"])
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_run_whose_output_cannot_be_written_goes_on(command, stream, commands, tmp_path):
    run = tmp_path / "run"
    result = commands(command, *WHOLE_RUN, run_directory(run), **{stream: "/dev/full"}).ok()
    assert "Traceback" not in result.err
    assert stream == "stderr" or "standard output cannot be written (No space left on device)" in result.err
    assert (run / "export/model.safetensors").exists() or any(run.glob("evaluation/*.json"))


def test_a_run_whose_output_nobody_reads_goes_on(commands, tmp_path):
    """The reader closes the pipe after a line, as `| head -1` does."""
    run, pipe = tmp_path / "run", tmp_path / "pipe"
    os.mkfifo(pipe)

    def head() -> None:
        with pipe.open() as reader:
            lines.append(reader.readline())

    lines: list[str] = []
    thread = threading.Thread(target=head)
    thread.start()
    result = commands("train", *WHOLE_RUN, run_directory(run), stdout=str(pipe)).ok()
    thread.join()
    assert lines[0].startswith("step 0: test: Pass@1")
    assert result.err.count("standard output cannot be written (Broken pipe): the run goes on in silence") == 1
    assert len(read_metrics(run)) == 4 and (run / "export").exists()


def test_a_second_job_is_refused_and_the_first_goes_on_until_sigusr1(commands, tmp_path):
    run = tmp_path / "run"
    first = commands.start("train", *FOREVER, run_directory(run))
    first.wait_for(run / "rollouts/step_1.jsonl")
    second = commands("train", *FOREVER, run_directory(run))
    assert second.code == 2
    assert re.fullmatch(rf"error: run directory {run} is in use by process {first.process.pid} on .*\n", second.err)
    steps = len(read_metrics(run))
    first.wait_for(run / f"rollouts/step_{steps + 2}.jsonl")
    first.process.send_signal(signal.SIGUSR1)
    result = first.wait().ok()
    last = len(read_metrics(run))
    assert f"asked to stop by SIGUSR1: saved step {last}" in result.out
    assert (run / f"checkpoints/step_{last}").is_dir()


def test_a_run_asked_to_stop_before_the_first_step_ends_with_success_too(commands, tmp_path):
    """The signal comes during the evaluation before training, so there is nothing to save."""
    run = tmp_path / "run"
    long = ("evaluation.enabled=true", "evaluation.samples=200")
    command = commands.start("train", *FOREVER, *long, run_directory(run))
    command.wait_for(run / "metrics.jsonl")
    command.process.send_signal(signal.SIGTERM)
    result = command.wait().ok()
    assert "asked to stop by SIGTERM: before the first step" in result.out
    assert not any((run / "checkpoints").iterdir())


HANGS = """
import pathlib, time

def hangs(*_):
    pathlib.Path("{}").touch()
    time.sleep(1000)
"""


@pytest.mark.parametrize("key", ["reward.function", "reward.verifier"])
def test_a_run_asked_to_stop_while_a_users_function_hangs_ends_within_about_one_time_limit(key, commands, tmp_path):
    """The run does not wait for all 16 calls of the function; it gives the step up."""
    run, called = tmp_path / "run", tmp_path / "called"
    (tmp_path / "my_hang.py").write_text(HANGS.format(called))
    slow = (f"{key}=my_hang:hangs", "reward.timeout=2", "reward.workers=1", "reward.require_think=false")
    command = commands.start("train", *FOREVER, *slow, run_directory(run), PYTHONPATH=str(tmp_path))
    command.wait_for(called)
    start = time.monotonic()
    command.process.send_signal(signal.SIGTERM)
    result = command.wait().ok()
    assert time.monotonic() - start < 30  # all calls, one after another, would take 32 s
    assert "step 1 is given up" in result.out and "asked to stop by SIGTERM: before the first step" in result.out
    assert not any((run / "checkpoints").iterdir())


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_ends_the_others_and_is_named(victim, commands, tmp_path):
    run = tmp_path / "run"
    command = commands.start("train", *FOREVER, run_directory(run), devices=2)
    command.wait_for(run / "rollouts/step_1.jsonl")
    ranks = find_ranks(command)
    assert sorted(ranks) == [0, 1]
    processes = [child for rank in ranks.values() for child in (rank, *rank.children(recursive=True))]
    os.kill(ranks[victim].pid, signal.SIGKILL)
    start = time.monotonic()
    result = command.wait()
    assert time.monotonic() - start < 25  # the watchdog would take 30 s
    assert result.code == 128 + signal.SIGKILL
    last = result.err.splitlines()[-1]
    assert last == f"error: rank {victim} was killed by SIGKILL (out of memory?); the other ranks were ended"
    assert psutil.wait_procs(processes, timeout=60)[1] == []  # no process is left, graders included


def test_a_checkpoint_that_cannot_be_written_ends_the_run_and_says_where(commands, tmp_path):
    run = tmp_path / "run"
    command = commands.start("train", *FOREVER, "exp_manager.checkpoint_every_n_steps=1", run_directory(run))
    command.wait_for(run / "checkpoints/step_1")
    (tmp_path / "file").touch()
    # This is one operation: between two of them, a save would make a new directory.
    assert _exchange(tmp_path / "file", run / "checkpoints")
    result = command.wait()
    assert result.code == 2
    assert re.search(rf"^error: checkpoint {run}/checkpoints/step_\d+ was not written: .+$", result.err, re.MULTILINE)
