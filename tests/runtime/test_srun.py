"""Which rank a task of srun is, without a SLURM: tests/slurm has a real one."""

import threading
import time
from pathlib import Path

import pytest

from nemo_disco.runtime import srun
from nemo_disco.runtime.errors import UserError

BATCH = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_GTIDS": "0"}
TASK = BATCH | {
    "SLURM_STEP_ID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_GTIDS": "2,3",
}
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", srun.MEETING)


@pytest.fixture
def adopt(monkeypatch, tmp_path):
    """adopt(SLURM's variables): what it set."""

    def call(variables):
        with monkeypatch.context() as patch:
            patch.setattr(srun.os, "environ", dict(variables))
            srun.set_rank_variables(tmp_path / "run", variables)
            return {name: srun.os.environ[name] for name in NAMES if name in srun.os.environ}

    return call


def test_a_task_of_several_is_a_rank(adopt, tmp_path):
    expected = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert adopt(TASK) == expected | {srun.MEETING: str(tmp_path / "run/.meeting.7.1.0")}


def test_a_requeued_job_meets_elsewhere(adopt):
    assert adopt(TASK | {"SLURM_RESTART_COUNT": "2"})[srun.MEETING].endswith(".meeting.7.1.2")


@pytest.mark.parametrize(
    "variables", [{}, BATCH, TASK | {"SLURM_STEP_NUM_TASKS": "1"}], ids=["no SLURM", "batch script", "step of one task"]
)
def test_nothing_else_is_a_rank(adopt, variables):
    assert adopt(variables) == {}


def test_what_torchrun_said_stands(adopt):
    assert adopt(TASK | {"RANK": "0"}) == {"RANK": "0"}


def test_an_address_that_the_user_gave_is_the_meeting(adopt):
    assert srun.MEETING not in adopt(TASK | {"MASTER_ADDR": "node1", "MASTER_PORT": "2"})


def test_the_others_wait_for_rank_0(tmp_path: Path):
    meeting = tmp_path / "run" / ".meeting"
    threading.Timer(0.5, srun.publish_address, (meeting, "10.0.0.1", 4321)).start()
    started = time.monotonic()
    assert srun.wait_for_address(meeting, 20) == ("10.0.0.1", 4321)
    assert time.monotonic() - started < 10
    with pytest.raises(UserError, match=r"rank 0 did not appear within 0 s in .*nowhere: every node must see"):
        srun.wait_for_address(tmp_path / "nowhere" / ".meeting", 0)
