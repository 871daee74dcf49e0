"""A real SLURM of two nodes on this machine, without systemd and on free ports: munged, slurmctld and two slurmd, in a
directory of its own. Ends what it started, and nothing else."""

from __future__ import annotations

import contextlib
import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

NODES = ("n1", "n2")
# A gpu here is a number that jobs ask for, so that the scripts are submitted as they are.
CONFIGURATION = """
ClusterName=nemo-disco-test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={here}/munge.socket
CryptoType=crypto/munge
StateSaveLocation={here}/state
SlurmdSpoolDir={here}/spool.%n
SlurmctldPidFile={here}/slurmctld.pid
SlurmdPidFile={here}/slurmd.%n.pid
SlurmctldLogFile={here}/slurmctld.log
SlurmdLogFile={here}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
MailProg=/bin/true
GresTypes=gpu
SchedulerParameters=sched_interval=2,sched_min_interval=0,bf_interval=2
KillWait=10
{nodes}
PartitionName=debug Nodes={names} Default=YES MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True)
class Cluster:
    """Its directory; the environment in which sbatch finds it; the pid of each daemon by name."""

    path: Path
    environment: dict[str, str]
    daemons: dict[str, subprocess.Popen[bytes]]

    def call(self, *command: str, cwd: Path | None = None) -> str:
        """The output of a SLURM client; CalledProcessError if it fails, its stderr in the test's output."""
        return subprocess.run(
            command, env=self.environment, cwd=cwd, check=True, stdout=subprocess.PIPE, text=True
        ).stdout.strip()


@contextlib.contextmanager
def cluster(path: Path) -> Iterator[Cluster]:
    """While entered, it takes jobs. `path`: a new directory, short enough for a socket's name."""
    path.mkdir()
    configuration = path / "slurm.conf"
    ports = free_ports(1 + len(NODES))
    host = socket.gethostname()
    configuration.write_text(
        CONFIGURATION.format(
            host=host,
            user=getpass.getuser(),
            here=path,
            controller=ports[0],
            names=",".join(NODES),
            nodes="\n".join(
                f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=4000 Gres=gpu:8"
                for name, port in zip(NODES, ports[1:], strict=True)
            ),
        )
    )
    for gpu in range(8):
        (path / f"gpu{gpu}").touch()
    (path / "gres.conf").write_text(f"Name=gpu File={path}/gpu[0-7]\n")
    (path / "state").mkdir()
    key = path / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    environment = {n: v for n, v in os.environ.items() if not n.startswith(("SLURM", "SBATCH", "PYTEST"))}
    running = Cluster(path, environment | {"SLURM_CONF": str(configuration)}, {})
    try:
        start(running)
        yield running
    finally:
        stop(running)


def start(running: Cluster) -> None:
    path = running.path
    socket_file = path / "munge.socket"
    munged = ["munged", "--foreground", "--force", f"--socket={socket_file}", f"--key-file={path}/munge.key"]
    munged += [f"--pid-file={path}/munge.pid", f"--seed-file={path}/munge.seed", f"--log-file={path}/munge.log"]
    daemon(running, "munged", munged)
    wait_for(socket_file.exists)
    daemon(running, "slurmctld", ["slurmctld", "-D"])
    for name in NODES:
        start_node(running, name)
    wait_for(lambda: running.call("sinfo", "--noheader", "--format=%D %t") == f"{len(NODES)} idle", seconds=60)


def start_node(running: Cluster, name: str) -> None:
    daemon(running, name, ["slurmd", "-D", "-N", name])


def stop(running: Cluster) -> None:
    """Its jobs first, so that none is left without its slurmd."""
    if "slurmctld" in running.daemons:
        with contextlib.suppress(subprocess.CalledProcessError, AssertionError):
            running.call("scancel", "--full", "--signal=KILL", f"--user={getpass.getuser()}")
            running.call("scancel", f"--user={getpass.getuser()}")
            wait_for(lambda: not running.call("squeue", "--noheader"), seconds=30)
    for process in reversed(running.daemons.values()):
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    shutil.rmtree(running.path, ignore_errors=True)


def daemon(running: Cluster, name: str, command: list[str]) -> None:
    # Debian keeps the daemons where a user's PATH does not look.
    path = f"{running.environment['PATH']}:/usr/sbin:/sbin"
    program = shutil.which(command[0], path=path)
    assert program is not None, f"{command[0]} is not installed: make test-slurm does it"
    with (running.path / f"{name}.out").open("ab") as out:
        running.daemons[name] = subprocess.Popen(
            # However the tests end, it ends with them.
            ["setpriv", "--pdeathsig=TERM", program, *command[1:]],
            env=running.environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
        )


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as probes:
        sockets = [probes.enter_context(socket.socket()) for _ in range(count)]
        for probe in sockets:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in sockets]


def wait_for(condition: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s in vain"
        time.sleep(0.2)


if __name__ == "__main__":  # a cluster to try things on: python tests/slurm/cluster.py DIRECTORY
    import sys

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with cluster(Path(sys.argv[1])) as shown:
        print(f"export SLURM_CONF={shown.environment['SLURM_CONF']}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
