"""The rank variables of srun's tasks, without SLURM; tests/slurm uses a real one."""

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
def set_variables(monkeypatch, tmp_path):
    """set_variables(variables) calls srun.set_rank_variables in this environment and returns its rank variables."""

    def call(variables):
        with monkeypatch.context() as patch:
            patch.setattr(srun.os, "environ", dict(variables))
            srun.set_rank_variables(tmp_path / "run", variables)
            return {name: srun.os.environ[name] for name in NAMES if name in srun.os.environ}

    return call


def test_a_task_of_several_is_a_rank(set_variables, tmp_path):
    expected = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert set_variables(TASK) == expected | {srun.MEETING: str(tmp_path / "run/.meeting.7.1.0")}


def test_a_requeued_job_has_another_meeting_file(set_variables):
    assert set_variables(TASK | {"SLURM_RESTART_COUNT": "2"})[srun.MEETING].endswith(".meeting.7.1.2")


@pytest.mark.parametrize(
    "variables", [{}, BATCH, TASK | {"SLURM_STEP_NUM_TASKS": "1"}], ids=["no SLURM", "batch script", "step of one task"]
)
def test_other_processes_are_no_ranks(set_variables, variables):
    assert set_variables(variables) == {}


def test_torchruns_variables_are_not_changed(set_variables):
    assert set_variables(TASK | {"RANK": "0"}) == {"RANK": "0"}


def test_the_users_master_address_needs_no_meeting_file(set_variables):
    assert srun.MEETING not in set_variables(TASK | {"MASTER_ADDR": "node1", "MASTER_PORT": "2"})


def test_other_ranks_wait_for_rank_0(tmp_path: Path):
    meeting = tmp_path / "run" / ".meeting"
    threading.Timer(0.5, srun.publish_address, (meeting, "10.0.0.1", 4321)).start()
    started = time.monotonic()
    assert srun.wait_for_address(meeting, 20) == ("10.0.0.1", 4321)
    assert time.monotonic() - started < 10
    with pytest.raises(UserError, match=r"rank 0 did not appear within 0 s in .*nowhere: every node must see"):
        srun.wait_for_address(tmp_path / "nowhere" / ".meeting", 0)
