"""A rank or a node that dies ends its job in under a minute, with an error that names it; nothing hangs."""

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
    """A job that trains on two nodes, slowly and for a long time."""
    break_file = str(tmp_path / "break")
    job = submit("train_multi_node.sbatch", [*TRAIN, "trainer.max_steps=1000"], PACE_S="2", BREAK=break_file)
    job.wait_for_step()
    return job


def assert_ends_in_a_minute(job: Job, error: str) -> str:
    """Wait a minute at most for the job's failure, and return its log, which must have this error (a pattern)."""
    started = time.monotonic()
    # A node that does not answer stays COMPLETING, long after the job has ended.
    wait_for(lambda: job.field("JobState") in ("FAILED", "COMPLETING"), MINUTE)
    print(f"{error}: ended after {time.monotonic() - started:.0f} s")
    assert job.field("ExitCode").partition(":")[0] != "0"
    log = job.log.read_text()
    assert re.search(f"^error: {error}", log, re.MULTILINE), log
    return log


def test_a_killed_rank_ends_its_job(training: Job) -> None:
    os.kill(training.rank_pid(2), signal.SIGKILL)
    assert_ends_in_a_minute(training, "rank 2 on n2: Killed")


def test_a_crash_leaves_its_traceback(training: Job) -> None:
    os.kill(training.rank_pid(3), signal.SIGSEGV)
    log = assert_ends_in_a_minute(training, "rank 3 on n2: Segmentation fault")
    assert "Fatal Python error: Segmentation fault" in log
    assert re.search(r'File ".*/nemo_disco/algorithms/trainer\.py", line \d+ in fit', log)


def test_an_error_of_a_users_objective_is_named_with_its_line(training: Job, tmp_path: Path) -> None:
    (tmp_path / "break").touch()
    message = r"objective paced raised RuntimeError at .*/paced\.py:\d+: broken on purpose"
    assert_ends_in_a_minute(training, f"rank 0 on n1: UserError: {message}")


def test_a_full_or_broken_disk_is_one_line(training: Job) -> None:
    rollouts = training.run / "rollouts"
    shutil.rmtree(rollouts)
    rollouts.touch()  # rank 0 cannot write into it
    log = assert_ends_in_a_minute(training, "rank 0 on n1: UserError: .*/rollouts/step_.*cannot be written")
    assert "Traceback" not in log


def test_a_node_that_falls_silent_ends_its_job(training: Job, node_2_pids: list[int]) -> None:
    for pid in node_2_pids:
        os.kill(pid, signal.SIGSTOP)  # as if the node had no power: its connections stay open
    assert_ends_in_a_minute(training, r"rank 0 on n1: TimeoutError: rank [23] on n2 has been silent for 30 s")


@pytest.fixture
def node_2_pids(slurm: Cluster, training: Job) -> Iterator[list[int]]:
    """The processes on n2: slurmd, the job's slurmstepd, and the ranks. Those that a test stops continue after it."""
    ranks = [training.rank_pid(rank) for rank in (2, 3)]
    slurmstepd = int(Path(f"/proc/{ranks[0]}/stat").read_text().rpartition(")")[2].split()[1])
    pids = [slurm.daemons["n2"].pid, slurmstepd, *ranks]
    yield pids
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    # Without this, SLURM would take minutes to decide that the node is down.
    slurm.call("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")

    def is_up() -> bool:
        if "DOWN" not in slurm.call("scontrol", "show", "node", "n2").partition("State=")[2].split()[0]:
            return True
        with contextlib.suppress(subprocess.CalledProcessError):  # the node came back by itself meanwhile
            slurm.call("scontrol", "update", "NodeName=n2", "State=RESUME", "Reason=test")
        return False

    wait_for(is_up, MINUTE)


def test_a_link_that_fails_cancels_the_rest_of_the_chain(slurm: Cluster, tmp_path: Path) -> None:
    environment = slurm.environment | {"RUN": str(tmp_path / "run")}
    command = ["slurm/chain.sh", "3", f"--output={tmp_path}/%j.log", "--nodes=1", "--ntasks-per-node=2"]
    command += ["--gpus-per-node=2", "--cpus-per-task=1", "slurm/train_one_node.sbatch", *TRAIN, "model.bogus=1"]
    output = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    links = [Job(number, slurm, tmp_path, tmp_path / f"{number}.log") for number in re.findall(r"job (\d+)", output)]
    assert [link.wait_for_end(MINUTE) for link in links] == ["FAILED", "CANCELLED", "CANCELLED"]
    assert "UserError: override 'model.bogus=1': unknown key" in links[0].log.read_text()
