"""A rank or a node that dies ends its job in under a minute, named, with what it said last; nothing hangs."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, wait_for
from jobs import ROOT, TRAIN, Job, Submit

pytestmark = pytest.mark.slurm
MINUTE = 60


@pytest.fixture
def training(submit: Submit, tmp_path: Path) -> Job:
    """Two nodes that train, slowly and for long."""
    broken = str(tmp_path / "break")
    job = submit("train_multi_node.sbatch", [*TRAIN, "trainer.max_steps=1000"], PACE_S="2", BREAK=broken)
    job.wait_for_step()
    return job


def assert_ends_in_a_minute(job: Job, what: str) -> str:
    """The job's log, in which `what` is an error's line."""
    started = time.monotonic()
    # A node that does not answer stays COMPLETING, long after the job has ended.
    wait_for(lambda: job.shown("JobState") in ("FAILED", "COMPLETING"), MINUTE)
    print(f"{what}: ended after {time.monotonic() - started:.0f} s")
    assert job.shown("ExitCode").partition(":")[0] != "0"
    log = job.log.read_text()
    assert re.search(f"^error: {what}", log, re.MULTILINE), log
    return log


def test_a_killed_rank(training: Job) -> None:
    os.kill(training.process(2), signal.SIGKILL)
    assert_ends_in_a_minute(training, "rank 2 on n2: Killed")


def test_a_crash_leaves_its_traceback(training: Job) -> None:
    os.kill(training.process(3), signal.SIGSEGV)
    log = assert_ends_in_a_minute(training, "rank 3 on n2: Segmentation fault")
    assert "Fatal Python error: Segmentation fault" in log
    assert re.search(r'File ".*/nemo_disco/algorithms/trainer\.py", line \d+ in fit', log)


def test_an_error_of_a_users_objective_is_named_with_its_line(training: Job, tmp_path: Path) -> None:
    (tmp_path / "break").touch()
    said = r"objective paced raised RuntimeError at .*/paced\.py:\d+: broken on purpose"
    assert_ends_in_a_minute(training, f"rank 0 on n1: UserError: {said}")


def test_a_full_or_broken_disk_is_one_line(training: Job) -> None:
    rollouts = training.run / "rollouts"
    shutil.rmtree(rollouts)
    rollouts.touch()  # rank 0 cannot write into it
    log = assert_ends_in_a_minute(training, "rank 0 on n1: UserError: .*/rollouts/step_.*cannot be written")
    assert "Traceback" not in log


def test_a_node_that_falls_silent(training: Job, frozen_node_2: list[int]) -> None:
    for pid in frozen_node_2:
        os.kill(pid, signal.SIGSTOP)  # like one without power: its connections stay open
    assert_ends_in_a_minute(training, r"rank 0 on n1: TimeoutError: rank [23] on n2 has been silent for 30 s")


@pytest.fixture
def frozen_node_2(slurm: Cluster, training: Job) -> Iterator[list[int]]:
    """What runs on it: its daemon, the job's keeper there, and the ranks. It thaws at the end."""
    ranks = [training.process(rank) for rank in (2, 3)]
    keeper = int(Path(f"/proc/{ranks[0]}/stat").read_text().rpartition(")")[2].split()[1])
    pids = [slurm.daemons["n2"].pid, keeper, *ranks]
    yield pids
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    # SLURM would take minutes to be sure.
    slurm.call("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")

    def serves() -> bool:
        if "DOWN" not in slurm.call("scontrol", "show", "node", "n2").partition("State=")[2].split()[0]:
            return True
        with contextlib.suppress(subprocess.CalledProcessError):  # it came back by itself meanwhile
            slurm.call("scontrol", "update", "NodeName=n2", "State=RESUME", "Reason=test")
        return False

    wait_for(serves, MINUTE)


def test_a_link_that_fails_takes_the_chain_along(slurm: Cluster, tmp_path: Path) -> None:
    environment = slurm.environment | {"RUN": str(tmp_path / "run")}
    command = ["slurm/chain.sh", "3", f"--output={tmp_path}/%j.log", "--nodes=1", "--ntasks-per-node=2"]
    command += ["--gpus-per-node=2", "--cpus-per-task=1", "slurm/train_one_node.sbatch", *TRAIN, "model.bogus=1"]
    said = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    links = [Job(number, slurm, tmp_path, tmp_path / f"{number}.log") for number in re.findall(r"job (\d+)", said)]
    assert [link.state(MINUTE) for link in links] == ["FAILED", "CANCELLED", "CANCELLED"]
    assert "UserError: override 'model.bogus=1': unknown key" in links[0].log.read_text()
