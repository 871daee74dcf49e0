"""The watchdog between real processes: a rank that falls silent ends the run and is named; nothing else does."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch.distributed as dist

from nemo_disco.runtime import srun, watchdog

SILENCE_S = 2.0
Start = Callable[..., list[BaseProcess]]


def run_rank(rank: int, here: Path, sleep: float) -> None:
    """Be one of three watched ranks: sleep for `sleep` seconds and end."""
    sys.stderr = (here / f"{rank}.log").open("w")
    os.dup2(sys.stderr.fileno(), 2)
    watchdog.BEAT_S, watchdog.SILENCE_S = 0.1, SILENCE_S
    os.environ["SLURMD_NODENAME"] = f"node{rank}"
    host, port = ("127.0.0.1", 0) if rank == 0 else srun.wait_for_address(here / "meeting", 60)
    store = dist.TCPStore(host, port, 3, rank == 0, timeout=datetime.timedelta(seconds=60), wait_for_workers=False)
    if rank == 0:
        srun.publish_address(here / "meeting", host, store.port)
    dog = watchdog.Watchdog(store, rank, 3)
    dog.start()
    (here / f"{rank}.ready").touch()
    time.sleep(sleep)
    dog.stop()
    os._exit(0)


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Start]:
    """ranks(sleep, sleep, sleep) starts three watched ranks that sleep so many seconds, and returns their processes."""
    started: list[BaseProcess] = []

    def start(*sleeps: float) -> list[BaseProcess]:
        for rank, sleep in enumerate(sleeps):  # forked: torch is imported already
            process = multiprocessing.get_context("fork").Process(target=run_rank, args=(rank, tmp_path, sleep))
            process.start()
            started.append(process)
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("*.ready"))) < len(sleeps):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return started

    yield start
    for process in started:
        process.kill()
        process.join()


def exit_code(process: BaseProcess) -> int | None:
    process.join(30)
    return process.exitcode


def send(process: BaseProcess, number: signal.Signals) -> None:
    assert process.pid is not None
    os.kill(process.pid, number)


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_silent_rank_is_named_by_rank_0(ranks: Start, tmp_path: Path, number: signal.Signals) -> None:
    processes = ranks(60, 60, 60)
    send(processes[2], number)
    assert exit_code(processes[0]) == 1
    log = (tmp_path / "0.log").read_text()
    assert "error: rank 2 on node2 has been silent for 2 s" in log
    assert "in run_rank" in log  # the traceback of rank 0


def test_a_silent_rank_0_is_named_by_the_others(ranks: Start, tmp_path: Path) -> None:
    processes = ranks(60, 60, 60)
    send(processes[0], signal.SIGSTOP)
    for rank in (1, 2):
        assert exit_code(processes[rank]) == 1
        assert "error: rank 0 on node0 has been silent" in (tmp_path / f"{rank}.log").read_text()


@pytest.mark.parametrize("first", [0, 1])
def test_a_rank_that_ends_early_or_is_busy_is_not_dead(ranks: Start, first: int) -> None:
    processes = ranks(*(0 if rank == first else 2 * SILENCE_S for rank in range(3)))
    assert [exit_code(process) for process in processes] == [0, 0, 0]


def test_the_death_of_rank_0_does_not_delay_the_others(ranks: Start) -> None:
    """They would be delayed by a new connection to its store, which waits as long as at the start."""
    processes = ranks(60, 1, 1)
    send(processes[0], signal.SIGKILL)
    assert {exit_code(process) for process in processes[1:]} <= {0, 1}


def test_a_job_that_is_suspended_as_a_whole_goes_on(ranks: Start) -> None:
    processes = ranks(7, 7, 7)
    for process in processes:
        send(process, signal.SIGSTOP)
    time.sleep(2 * SILENCE_S)
    for process in processes:
        send(process, signal.SIGCONT)
    assert [exit_code(process) for process in processes] == [0, 0, 0]
