"""A real SLURM of two nodes on this machine, without systemd and on free ports: munged, slurmctld and two slurmd, in a
directory of its own. It ends only processes that it started."""

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
# The GPUs are only counted, so that the scripts, which ask for GPUs, can be submitted as they are.
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
    """A running SLURM: its directory, the environment in which sbatch finds it, and its daemons' processes by name."""

    path: Path
    environment: dict[str, str]
    daemons: dict[str, subprocess.Popen[bytes]]

    def call(self, *command: str, cwd: Path | None = None) -> str:
        """Run a SLURM client and return its output. Raises CalledProcessError if it fails."""
        return subprocess.run(
            command, env=self.environment, cwd=cwd, check=True, stdout=subprocess.PIPE, text=True
        ).stdout.strip()


@contextlib.contextmanager
def run_cluster(path: Path) -> Iterator[Cluster]:
    """A context with a SLURM that accepts jobs. path: a new directory, short enough for the name of a socket in it."""
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
    cluster = Cluster(path, environment | {"SLURM_CONF": str(configuration)}, {})
    try:
        start(cluster)
        yield cluster
    finally:
        stop(cluster)


def start(cluster: Cluster) -> None:
    """Start the daemons, and wait until both nodes are idle."""
    path = cluster.path
    socket_file = path / "munge.socket"
    munged = ["munged", "--foreground", "--force", f"--socket={socket_file}", f"--key-file={path}/munge.key"]
    munged += [f"--pid-file={path}/munge.pid", f"--seed-file={path}/munge.seed", f"--log-file={path}/munge.log"]
    start_daemon(cluster, "munged", munged)
    wait_for(socket_file.exists)
    start_daemon(cluster, "slurmctld", ["slurmctld", "-D"])
    for name in NODES:
        start_node(cluster, name)
    wait_for(lambda: cluster.call("sinfo", "--noheader", "--format=%D %t") == f"{len(NODES)} idle", seconds=60)


def start_node(cluster: Cluster, name: str) -> None:
    start_daemon(cluster, name, ["slurmd", "-D", "-N", name])


def stop(cluster: Cluster) -> None:
    """End the jobs, then the daemons, so that no job is left without its slurmd; remove the directory."""
    if "slurmctld" in cluster.daemons:
        with contextlib.suppress(subprocess.CalledProcessError, AssertionError):
            cluster.call("scancel", "--full", "--signal=KILL", f"--user={getpass.getuser()}")
            cluster.call("scancel", f"--user={getpass.getuser()}")
            wait_for(lambda: not cluster.call("squeue", "--noheader"), seconds=30)
    for process in reversed(cluster.daemons.values()):
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    shutil.rmtree(cluster.path, ignore_errors=True)


def start_daemon(cluster: Cluster, name: str, command: list[str]) -> None:
    # Debian keeps the daemons where a user's PATH does not look.
    path = f"{cluster.environment['PATH']}:/usr/sbin:/sbin"
    program = shutil.which(command[0], path=path)
    assert program is not None, f"{command[0]} is not installed: `make test-slurm` installs it"
    with (cluster.path / f"{name}.out").open("ab") as out:
        cluster.daemons[name] = subprocess.Popen(
            # The daemon ends with the tests, however they end.
            ["setpriv", "--pdeathsig=TERM", program, *command[1:]],
            env=cluster.environment,
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
        assert time.monotonic() < deadline, f"the condition did not hold within {seconds:.0f} s"
        time.sleep(0.2)


if __name__ == "__main__":  # to try things on a cluster: python tests/slurm/cluster.py DIRECTORY
    import sys

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with run_cluster(Path(sys.argv[1])) as test_cluster:
        print(f"export SLURM_CONF={test_cluster.environment['SLURM_CONF']}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
