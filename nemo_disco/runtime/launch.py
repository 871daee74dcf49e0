"""Launcher for one machine without torchrun or srun: starts the ranks, watches them, and names a rank that fails.

It ends the other ranks within seconds. Starts nothing if RANK is set (torchrun, srun). Touches environment variables,
signals and child processes; must not import torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from nemo_disco.runtime import srun
from nemo_disco.runtime.errors import UserError, one_line
from nemo_disco.runtime.files import Scratch
from nemo_disco.runtime.stop_signals import STOP_SIGNALS, is_ignored

FORWARDED = (signal.SIGINT, *STOP_SIGNALS)
POLL_S = 0.05
# Peers of a dead rank notice closed connections and end by themselves; a rank that has not after this time is stuck.
GRACE_S = 2.0
INTERRUPT_GRACE_S = 10.0
# Signals of the kernel or a user. Not SIGABRT: when a peer fails, NCCL's watchdog aborts ranks that did not.
CRASHES = {signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE}
PR_SET_PDEATHSIG = 1
GPU_DRIVER = Path("/dev/nvidiactl")
# Variables with settings of torch's GPU allocator; newer versions of torch read the second.
ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
GROWING_SEGMENTS = "expandable_segments:True"
_LAUNCHER, _REPORTS = "NEMO_DISCO_LAUNCHER", "NEMO_DISCO_REPORTS"


@dataclass(frozen=True)
class _Exit:
    """A rank's exit code, as Popen gives it, and the earliest time at which the rank may have ended."""

    code: int
    time: float


def is_rank() -> bool:
    """True if torchrun, srun or `spawn` started this process as a rank."""
    return "RANK" in os.environ


def world_size(devices: int, num_nodes: int, set_by_user: bool) -> int:
    """The number of ranks: WORLD_SIZE under a launcher, else devices x num_nodes.

    Raises UserError if the two differ and the user has set the latter (`set_by_user`), or for several nodes without a
    launcher.
    """
    configured = devices * num_nodes
    if not is_rank():
        if num_nodes > 1:
            raise UserError(
                f"trainer.num_nodes={num_nodes} needs a launcher that starts the other nodes: srun, or torchrun on each"
            )
        return configured
    try:
        size = int(os.environ["WORLD_SIZE"])
    except (KeyError, ValueError) as error:
        raise UserError(
            "RANK is set but WORLD_SIZE is not a number: start with torchrun or srun, or unset RANK"
        ) from error
    if set_by_user and size != configured:
        raise UserError(
            f"trainer.devices={devices} x trainer.num_nodes={num_nodes} makes {configured} processes, but the launcher "
            f"started {size} (WORLD_SIZE): leave both settings out, or make them agree"
        )
    return size


def spawn(processes: int, command: Sequence[str]) -> int:
    """Run a command as ranks 0 .. processes - 1 of this machine, wait for them and return an exit code.

    It is 0 if all ranks end with 0, else that of the rank that failed first (128 + n if signal n killed it). SIGINT,
    SIGTERM, SIGUSR1 and SIGHUP are forwarded to every rank.
    """
    with contextlib.closing(Scratch()) as scratch:
        reports = scratch.path
        children: list[subprocess.Popen[bytes]] = []
        with _forward_signals(children) as signals:
            try:
                with socket.socket() as probe:  # a free port
                    probe.bind(("127.0.0.1", 0))
                    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
                for rank in range(processes):
                    environment = _rank_environment(rank, processes, str(reports)) | address
                    children.append(
                        # A process group of its own, so that Ctrl-C reaches each rank once: through this process.
                        subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, process_group=0)
                    )
                exits = _watch(children, signals, reports)
            finally:
                _kill(children)
        return _exit_code(exits, signals, reports)


def die_with_launcher() -> None:
    """In a rank that `spawn` started, make the kernel kill it when the launcher dies. Call this first."""
    launcher = os.environ.pop(_LAUNCHER, None)
    if launcher is None:
        return
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(launcher):
        os._exit(1)  # the launcher died before the call above


def report(error: BaseException) -> bool:
    """In a rank that `spawn` started, write the error to a file that the launcher reads; False if no launcher will
    print it. In a task of srun, print it as a line of the log.

    After a UserError this rank waits for the launcher to end it, or its peers would print that they lost it.
    """
    directory = os.environ.get(_REPORTS)
    if directory is None:
        srun.report(error)
        return False
    kind = "user" if isinstance(error, UserError) else type(error).__name__
    record = {"time": time.time(), "kind": kind, "message": one_line(error)}
    record |= {"exit_code": error.exit_code} if isinstance(error, UserError) else {}
    path = Path(directory) / os.environ["RANK"]
    try:
        path.with_suffix(".part").write_text(json.dumps(record))
        path.with_suffix(".part").rename(path)
    except OSError:  # the temporary folder is full, or the launcher is gone
        return False
    if isinstance(error, UserError):
        time.sleep(GRACE_S)
    return True


def set_torch_defaults() -> None:
    """Set variables that torch reads at import, unless the user has: one thread per process without a GPU; on GPUs
    memory segments that grow, since micro-batches of varying sizes fragment fixed ones."""
    if not GPU_DRIVER.exists():
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    elif not any(name in os.environ for name in ALLOCATOR_VARIABLES):
        os.environ[ALLOCATOR_VARIABLES[0]] = GROWING_SEGMENTS


def _rank_environment(rank: int, processes: int, reports: str) -> dict[str, str]:
    # As torchrun does: with several processes, more threads in each are slower.
    defaults = {"OMP_NUM_THREADS": "1"}
    if sys.platform == "linux":
        # All ranks are on this machine; they must start even if its host name does not resolve.
        defaults["GLOO_SOCKET_IFNAME"] = "lo"
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    ranks[_LAUNCHER] = os.getpid()
    return defaults | os.environ | {name: str(value) for name, value in ranks.items()} | {_REPORTS: reports}


@contextlib.contextmanager
def _forward_signals(children: list[subprocess.Popen[bytes]]) -> Iterator[list[signal.Signals]]:
    """Forward signals to the children inside the `with`; yields the list of the received signals."""
    signals: list[signal.Signals] = []

    def forward(number: int, _: FrameType | None) -> None:
        signals.append(signal.Signals(number))
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    numbers = [number for number in FORWARDED if not is_ignored(number)]
    handlers: dict[signal.Signals, Any] = {number: signal.signal(number, forward) for number in numbers}
    try:
        yield signals
    finally:
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _watch(children: list[subprocess.Popen[bytes]], signals: list[signal.Signals], reports: Path) -> dict[int, _Exit]:
    """Wait until all ranks end, one reports a UserError, or a grace period after a failure or Ctrl-C is over. Returns
    the exits by rank."""
    exits: dict[int, _Exit] = {}
    deadline: float | None = None
    while True:
        for rank, child in enumerate(children):
            if rank not in exits and (code := child.poll()) is not None:
                exits[rank] = _Exit(code, time.time() - POLL_S)
        has_user_error = any(report["kind"] == "user" for report in _read_reports(reports).values())
        if has_user_error or len(exits) == len(children) or (deadline is not None and time.monotonic() > deadline):
            return exits
        if deadline is None and any(end.code for end in exits.values()):
            deadline = time.monotonic() + GRACE_S
        if deadline is None and signal.SIGINT in signals:
            deadline = time.monotonic() + INTERRUPT_GRACE_S
        time.sleep(POLL_S)


def _kill(children: list[subprocess.Popen[bytes]]) -> None:
    """Kill the ranks that still run, with all processes that they started."""
    for child in children:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
    for child in children:
        child.wait()


def _read_reports(directory: Path) -> dict[int, dict[str, Any]]:
    return {int(path.name): json.loads(path.read_text()) for path in directory.iterdir() if path.suffix == ""}


def _exit_code(exits: dict[int, _Exit], signals: list[signal.Signals], directory: Path) -> int:
    """The exit code of the run. Prints which rank failed first, and why."""
    if signal.SIGINT in signals:
        return 128 + signal.SIGINT
    failures = {rank: end for rank, end in exits.items() if end.code}
    reports = _read_reports(directory)
    if not failures and not reports:
        return 0

    def failure_time(rank: int) -> float:
        if rank in reports:
            return float(reports[rank]["time"])
        # A crash leaves no report, and its peers may report closed connections before its exit is noticed.
        return 0.0 if -failures[rank].code in CRASHES else failures[rank].time

    first = min({*failures, *reports}, key=failure_time)
    code, report = failures[first].code if first in failures else 1, reports.get(first)
    if report is not None and report["kind"] == "user":
        print(f"error: {report['message']}", file=sys.stderr)
        return int(report["exit_code"])
    if -code in signals:
        return 128 - code
    if code < 0:
        why = f"was killed by {signal.Signals(-code).name}" + (" (out of memory?)" if code == -signal.SIGKILL else "")
    else:
        why = f"failed: {report['kind']}: {report['message']}" if report else f"ended with exit code {code}"
    print(f"error: rank {first} {why}; the other ranks were ended", file=sys.stderr)
    return code if code > 0 else 128 - code
