"""Ranks under srun: each task's RANK and the like, and the meeting file that tells the other ranks rank 0's address.

Touches environment variables and that file, in the run directory; must not import torch. Does nothing where RANK is
already set, by torchrun or launch.spawn.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from nemo_disco.runtime.errors import UserError, one_line
from nemo_disco.runtime.files import write_atomically

MEETING = "NEMO_DISCO_MEETING"
POLL_S = 0.2


def set_rank_variables(run_directory: Path | str, environment: Mapping[str, str] = os.environ) -> None:
    """In a task of a step with several tasks, set RANK and its like, and without MASTER_ADDR also MEETING, the path of
    the meeting file. A shell under salloc, a batch script and a step of one task are left alone."""
    if "RANK" in environment or int(environment.get("SLURM_STEP_NUM_TASKS", 1)) == 1:
        return
    rank, size = environment["SLURM_PROCID"], environment["SLURM_STEP_NUM_TASKS"]
    os.environ.update(RANK=rank, WORLD_SIZE=size, LOCAL_RANK=environment["SLURM_LOCALID"])
    os.environ["LOCAL_WORLD_SIZE"] = str(environment["SLURM_GTIDS"].count(",") + 1)  # the tasks of this node
    print(f"rank {rank} of {size} on {node_name()}", file=sys.stderr)
    if "MASTER_ADDR" not in environment:
        # Another name after each restart of the job, so that no file of an earlier start is read.
        ids = [environment[name] for name in ("SLURM_JOB_ID", "SLURM_STEP_ID")]
        name = ".".join([*ids, environment.get("SLURM_RESTART_COUNT", "0")])
        os.environ[MEETING] = str(Path(run_directory).resolve() / f".meeting.{name}")


def node_name() -> str:
    """This node's name in SLURM, or else its host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def report(error: BaseException) -> None:
    """In a task, print when and why this rank failed; slurm/lib.sh finds the first failure by these lines."""
    if "SLURM_STEP_ID" in os.environ:
        cause = f"{type(error).__name__}: {one_line(error)}"
        print(f"FAILED {time.time():.3f} rank {os.environ['SLURM_PROCID']} on {node_name()}: {cause}", file=sys.stderr)


def node_address() -> str:
    """This node's IP address: its host name's, or that of its route to srun if the name only resolves to loopback."""
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        address = "127.0.0.1"
    srun = os.environ.get("SLURM_LAUNCH_NODE_IPADDR")
    if not address.startswith("127.") or srun is None:
        return address
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # connecting a datagram socket sends nothing
        probe.connect((srun, 9))
        return str(probe.getsockname()[0])


def publish_address(meeting: Path, host: str, port: int) -> None:
    """Write the meeting file: the host and port on which rank 0 listens."""
    write_atomically(meeting, f"{host} {port}")


def wait_for_address(meeting: Path, timeout_s: float) -> tuple[str, int]:
    """Wait for the meeting file; return rank 0's host and port. Raises UserError after `timeout_s` seconds."""
    deadline = time.monotonic() + timeout_s
    # List the directory: NFS caches for a while that a file does not exist.
    while not (meeting.parent.is_dir() and meeting.name in os.listdir(meeting.parent)):
        if time.monotonic() > deadline:
            raise UserError(
                f"rank 0 did not appear within {timeout_s:.0f} s in {meeting.parent}: every node must see "
                "exp_manager.explicit_log_dir, and rank 0's log says more"
            )
        time.sleep(POLL_S)
    host, port = meeting.read_text(encoding="utf-8").split()
    return host, int(port)
