"""The watchdog between real processes: a rank that falls silent ends the run and is named; nothing else does."""

import os
import signal
import subprocess
import sys
import time

import pytest

SILENCE_S = 2.0
RANK = f"""
import datetime, os, sys, time
from pathlib import Path
import torch.distributed as dist
from nemo_disco.runtime import srun, watchdog
watchdog.BEAT_S, watchdog.SILENCE_S = 0.1, {SILENCE_S}
rank, meeting, sleep = int(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
os.environ["SLURMD_NODENAME"] = f"node{{rank}}"
host, port = ("127.0.0.1", 0) if rank == 0 else srun.find(meeting, 60)
store = dist.TCPStore(host, port, 3, rank == 0, timeout=datetime.timedelta(seconds=60), wait_for_workers=False)
if rank == 0:
    srun.publish(meeting, host, store.port)
dog = watchdog.Watchdog(store, rank, 3)
dog.start()
print("watched", flush=True)
time.sleep(sleep)
dog.stop()
"""


@pytest.fixture
def ranks(tmp_path):
    """start(seconds of work of each of three ranks): their processes, once all are watched."""
    started: list[subprocess.Popen[str]] = []

    def start(*sleeps: float) -> list[subprocess.Popen[str]]:
        for rank, sleep in enumerate(sleeps):
            command = [sys.executable, "-c", RANK, str(rank), str(tmp_path / "meeting"), str(sleep)]
            started.append(
                subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
            )
        for process in started:
            assert process.stdout.readline() == "watched\n"
        return started

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_silent_rank_is_named_by_rank_0(ranks, number):
    processes = ranks(60, 60, 60)
    processes[2].send_signal(number)
    assert processes[0].wait(20) == 1
    words = processes[0].stderr.read()
    assert "error: rank 2 on node2 has been silent for 2 s" in words
    assert 'File "<string>", line' in words  # where rank 0 was


def test_a_silent_rank_0_is_named_by_the_others(ranks):
    processes = ranks(60, 60, 60)
    processes[0].send_signal(signal.SIGSTOP)
    for process in processes[1:]:
        assert process.wait(20) == 1
        assert "error: rank 0 on node0 has been silent" in process.stderr.read()


@pytest.mark.parametrize("first", [0, 1])
def test_who_ends_early_or_is_busy_is_not_dead(ranks, first):
    for process in ranks(*(0 if rank == first else 2 * SILENCE_S for rank in range(3))):
        assert process.wait(30) == 0, process.stderr.read()


def test_a_rank_0_that_left_without_a_word_holds_nobody_up(ranks):
    """A store's connection that is tried again for minutes would."""
    processes = ranks(60, 1, 1)
    processes[0].kill()
    for process in processes[1:]:
        assert process.wait(30) in (0, 1)


def test_a_job_that_is_suspended_as_a_whole_goes_on(ranks):
    processes = ranks(4, 4, 4)
    for process in processes:
        process.send_signal(signal.SIGSTOP)
    time.sleep(2 * SILENCE_S)
    for process in processes:
        process.send_signal(signal.SIGCONT)
    for process in processes:
        assert process.wait(20) == 0, process.stderr.read()
