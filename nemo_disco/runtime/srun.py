"""Under srun: which rank this task is, and the file through which the ranks of a step find rank 0.

Touches environment variables and one file in the run directory; must not import torch. torchrun, and `spawn`, have set
RANK already: then nothing here applies.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.files import write_atomically

MEETING = "NEMO_DISCO_MEETING"
POLL_S = 0.2


def adopt(run_directory: Path | str, environment: Mapping[str, str] = os.environ) -> None:
    """In a task of a step of several: set RANK and its like, and where to meet. A shell under salloc, a batch script
    and a step of one task are no such thing."""
    if "RANK" in environment or int(environment.get("SLURM_STEP_NUM_TASKS", 1)) == 1:
        return
    os.environ["RANK"] = environment["SLURM_PROCID"]
    os.environ["WORLD_SIZE"] = environment["SLURM_STEP_NUM_TASKS"]
    os.environ["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    os.environ["LOCAL_WORLD_SIZE"] = str(environment["SLURM_GTIDS"].count(",") + 1)  # the tasks of this node
    print(f"rank {environment['SLURM_PROCID']} of {environment['SLURM_STEP_NUM_TASKS']} on {node()}", file=sys.stderr)
    if "MASTER_ADDR" not in environment:
        # A name of its own for each life of the job: what an earlier one left is never read.
        life = [environment[name] for name in ("SLURM_JOB_ID", "SLURM_STEP_ID")]
        name = ".".join([*life, environment.get("SLURM_RESTART_COUNT", "0")])
        os.environ[MEETING] = str(Path(run_directory).resolve() / f".meeting.{name}")


def node() -> str:
    """This node as SLURM calls it, or else its host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def report(error: BaseException) -> None:
    """In a task: a line that says when this rank failed and of what, by which slurm/lib.sh finds the first."""
    if "SLURM_STEP_ID" in os.environ:
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        print(f"FAILED {time.time():.3f} rank {os.environ['SLURM_PROCID']} on {node()}: {what}", file=sys.stderr)


def address() -> str:
    """This node's address, for the others: of its name, or of its route to srun if the name is known to it alone."""
    try:
        found = socket.gethostbyname(socket.gethostname())
    except OSError:
        found = "127.0.0.1"
    srun = os.environ.get("SLURM_LAUNCH_NODE_IPADDR")
    if not found.startswith("127.") or srun is None:
        return found
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # connecting a datagram socket sends nothing
        probe.connect((srun, 9))
        return str(probe.getsockname()[0])


def publish(meeting: Path, host: str, port: int) -> None:
    """Rank 0 says where it listens."""
    write_atomically(meeting, f"{host} {port}")


def find(meeting: Path, timeout_s: float) -> tuple[str, int]:
    """The host and port that rank 0 published. Raises UserError if it does not within the time."""
    deadline = time.monotonic() + timeout_s
    # Listing the directory, since NFS remembers for a while that a file was not there.
    while not (meeting.parent.is_dir() and meeting.name in os.listdir(meeting.parent)):
        if time.monotonic() > deadline:
            raise UserError(
                f"rank 0 did not appear within {timeout_s:.0f} s in {meeting.parent}: every node must see "
                "exp_manager.explicit_log_dir, and rank 0's log says more"
            )
        time.sleep(POLL_S)
    host, port = meeting.read_text(encoding="utf-8").split()
    return host, int(port)
