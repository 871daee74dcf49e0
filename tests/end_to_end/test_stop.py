"""Asked to stop, a run saves and ends well; robbed of a rank, it ends at once and says which. Real signals."""

from __future__ import annotations

import os
import re
import signal
import threading
import time

import psutil
import pytest
from commands import WHOLE, at, held, metrics
from same_run import assert_same

from nemo_disco.runtime.files import _exchange

FOREVER = ("trainer.max_steps=1000000",)


def ranks_of(started):
    """The rank processes of a command that started them itself, by rank."""
    children = psutil.Process(started.process.pid).children()
    return {int(c.environ()["RANK"]): c for c in children if "RANK" in c.environ()}


def test_a_signal_saves_the_step_and_the_next_life_ends_as_one(finished, commands, tmp_path):
    """With two ranks it is what a terminal sends to the launcher when it is closed."""
    run = tmp_path / "run"
    number = signal.SIGTERM if finished.ranks == 1 else signal.SIGHUP
    never = "exp_manager.checkpoint_every_n_steps=1000"  # so that it is the signal that saves
    # However late the signal comes, it comes before the last step.
    held_back = held(tmp_path, "/rollouts/.step_2.jsonl")
    stopped = commands.start("train", *WHOLE, never, at(run), devices=finished.ranks, **held_back)
    stopped.wait_for(run / "rollouts/step_1.jsonl")
    stopped.process.send_signal(number)
    (tmp_path / "go").touch()
    done = stopped.wait().ok()
    said = re.search(rf"asked to stop by {number.name}: saved step (\d)", done.out)
    assert said is not None, done.out
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step_{said[1]}"]
    assert len(metrics(run)) == int(said[1]) < 4
    assert not (run / "export").exists()
    commands("train", *WHOLE, at(run), ranks=finished.ranks).ok()
    assert_same(run, finished.path)


@pytest.mark.parametrize("command", ["train", "evaluate"])
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_run_whose_words_cannot_be_written_goes_on(command, stream, commands, tmp_path):
    run = tmp_path / "run"
    done = commands(command, *WHOLE, at(run), **{stream: "/dev/full"}).ok()
    assert "Traceback" not in done.err
    assert stream == "stderr" or "standard output cannot be written (No space left on device)" in done.err
    assert (run / "export/model.safetensors").exists() or any(run.glob("evaluation/*.json"))


def test_a_run_whose_reader_leaves_goes_on(commands, tmp_path):
    """As under `| head -1`."""
    run, pipe = tmp_path / "run", tmp_path / "pipe"
    os.mkfifo(pipe)

    def head() -> None:
        with pipe.open() as reader:
            lines.append(reader.readline())

    lines: list[str] = []
    thread = threading.Thread(target=head)
    thread.start()
    done = commands("train", *WHOLE, at(run), stdout=str(pipe)).ok()
    thread.join()
    assert lines[0].startswith("step 0: test: Pass@1")
    assert done.err.count("standard output cannot be written (Broken pipe): the run goes on in silence") == 1
    assert len(metrics(run)) == 4 and (run / "export").exists()


def test_a_second_job_is_refused_and_the_first_goes_on_until_sigusr1(commands, tmp_path):
    run = tmp_path / "run"
    first = commands.start("train", *FOREVER, at(run))
    first.wait_for(run / "rollouts/step_1.jsonl")
    second = commands("train", *FOREVER, at(run))
    assert second.code == 2
    assert re.fullmatch(rf"error: run directory {run} is in use by process {first.process.pid} on .*\n", second.err)
    steps = len(metrics(run))
    first.wait_for(run / f"rollouts/step_{steps + 2}.jsonl")
    first.process.send_signal(signal.SIGUSR1)
    done = first.wait().ok()
    last = len(metrics(run))
    assert f"asked to stop by SIGUSR1: saved step {last}" in done.out
    assert (run / f"checkpoints/step_{last}").is_dir()


def test_asked_before_the_first_step_it_ends_well_too(commands, tmp_path):
    """While the evaluation before training runs; there is nothing to save."""
    run = tmp_path / "run"
    long = ("evaluation.enabled=true", "evaluation.samples=200")
    started = commands.start("train", *FOREVER, *long, at(run))
    started.wait_for(run / "metrics.jsonl")
    started.process.send_signal(signal.SIGTERM)
    done = started.wait().ok()
    assert "asked to stop by SIGTERM: before the first step" in done.out
    assert not any((run / "checkpoints").iterdir())


HANGS = """
import pathlib, time

def hangs(*_):
    pathlib.Path("{}").touch()
    time.sleep(1000)
"""


@pytest.mark.parametrize("key", ["reward.function", "reward.verifier"])
def test_asked_while_a_users_function_hangs_it_ends_within_about_one_time_limit(key, commands, tmp_path):
    """Not after all 16 calls of it; the step is given up, and the next life asks its questions again."""
    run, called = tmp_path / "run", tmp_path / "called"
    (tmp_path / "my_hang.py").write_text(HANGS.format(called))
    slow = (f"{key}=my_hang:hangs", "reward.timeout=2", "reward.workers=1", "reward.require_think=false")
    started = commands.start("train", *FOREVER, *slow, at(run), PYTHONPATH=str(tmp_path))
    started.wait_for(called)
    asked = time.monotonic()
    started.process.send_signal(signal.SIGTERM)
    done = started.wait().ok()
    assert time.monotonic() - asked < 30  # one after another they take 32 s
    assert "step 1 is given up" in done.out and "asked to stop by SIGTERM: before the first step" in done.out
    assert not any((run / "checkpoints").iterdir())


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_ends_the_others_and_is_named(victim, commands, tmp_path):
    run = tmp_path / "run"
    started = commands.start("train", *FOREVER, at(run), devices=2)
    started.wait_for(run / "rollouts/step_1.jsonl")
    ranks = ranks_of(started)
    assert sorted(ranks) == [0, 1]
    family = [child for rank in ranks.values() for child in (rank, *rank.children(recursive=True))]
    os.kill(ranks[victim].pid, signal.SIGKILL)
    killed = time.monotonic()
    done = started.wait()
    assert time.monotonic() - killed < 25  # before the watchdog, which takes 30 s
    assert done.code == 128 + signal.SIGKILL
    last = done.err.splitlines()[-1]
    assert last == f"error: rank {victim} was killed by SIGKILL (out of memory?); the other ranks were ended"
    assert psutil.wait_procs(family, timeout=60)[1] == []  # nobody is left behind, graders included


def test_a_checkpoint_that_cannot_be_written_ends_the_run_and_says_where(commands, tmp_path):
    run = tmp_path / "run"
    started = commands.start("train", *FOREVER, "exp_manager.checkpoint_every_n_steps=1", at(run))
    started.wait_for(run / "checkpoints/step_1")
    (tmp_path / "file").touch()
    assert _exchange(tmp_path / "file", run / "checkpoints")  # at once, or a save makes a new directory in between
    done = started.wait()
    assert done.code == 2
    assert re.search(rf"^error: checkpoint {run}/checkpoints/step_\d+ was not written: .+$", done.err, re.MULTILINE)
