"""One machine, several processes, no launcher: the command starts its ranks itself, watches them and dies with them.

Under torchrun or srun (RANK is set) nothing here starts anything. Touches environment variables, signals and child
processes; must not import torch. A rank that fails ends the others within seconds, and is named.
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
from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.files import Scratch
from nemo_disco.runtime.signals import STOP_SIGNALS, is_ignored

FORWARDED = (signal.SIGINT, *STOP_SIGNALS)
POLL_S = 0.05
# Peers of a dead rank see their connections close and end by themselves, tidily; a peer that does not is stuck.
GRACE_S = 2.0
INTERRUPT_GRACE_S = 10.0
# What the kernel or a user does to a process. Not SIGABRT: a peer's failure makes NCCL's watchdog abort a sound rank.
CRASHES = {signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE}
PR_SET_PDEATHSIG = 1
GPU_DRIVER = Path("/dev/nvidiactl")
# How torch's allocator on GPUs is set; the second name is newer torch's.
ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
GROWING_SEGMENTS = "expandable_segments:True"
_LAUNCHER, _REPORTS = "NEMO_DISCO_LAUNCHER", "NEMO_DISCO_REPORTS"


@dataclass(frozen=True)
class _End:
    """How a rank ended (as Popen says it), and the earliest time at which it may have."""

    code: int
    seen: float


def launched() -> bool:
    """Whether this process is a rank that torchrun, srun or `spawn` started."""
    return "RANK" in os.environ


def world_size(devices: int, num_nodes: int, overridden: bool) -> int:
    """The number of ranks: WORLD_SIZE under a launcher, else devices x num_nodes.

    Raises UserError if the two differ and the user asked for the latter (`overridden`), or if several nodes are asked
    for without a launcher.
    """
    asked = devices * num_nodes
    if not launched():
        if num_nodes > 1:
            raise UserError(
                f"trainer.num_nodes={num_nodes} needs a launcher that starts the other nodes: srun, or torchrun on each"
            )
        return asked
    try:
        size = int(os.environ["WORLD_SIZE"])
    except (KeyError, ValueError) as error:
        raise UserError(
            "RANK is set but WORLD_SIZE is not a number: start with torchrun or srun, or unset RANK"
        ) from error
    if overridden and size != asked:
        raise UserError(
            f"trainer.devices={devices} x trainer.num_nodes={num_nodes} makes {asked} processes, but the launcher "
            f"started {size} (WORLD_SIZE): leave both out, or make them agree"
        )
    return size


def spawn(processes: int, command: Sequence[str]) -> int:
    """Run a command as ranks 0 .. processes - 1 of this machine; the exit code of the run.

    0 if all ranks end with 0; otherwise the code of the rank that failed first (128 + n if signal n killed it).
    SIGINT, SIGTERM, SIGUSR1 and SIGHUP are passed on to every rank.
    """
    with Scratch() as reports:
        children: list[subprocess.Popen[bytes]] = []
        with _forwarding(children) as received:
            try:
                address = _free_address()
                for rank in range(processes):
                    environment = os.environ | address | _rank_environment(rank, processes, str(reports))
                    children.append(
                        # A group of its own: Ctrl-C reaches the ranks once, through us.
                        subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, process_group=0)
                    )
                ended = _watch(children, received, reports)
            finally:
                _kill(children)
        return _verdict(ended, received, reports)


def adopt() -> None:
    """In a rank that `spawn` started: die when the launcher dies. Call it first."""
    launcher = os.environ.pop(_LAUNCHER, None)
    if launcher is None:
        return
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(launcher):
        os._exit(1)  # it died before the request above


def report(error: BaseException) -> bool:
    """In a rank that `spawn` started: leave word of the error for the launcher; False if no launcher will say it.
    In a task of srun the word is a line of its log.

    After a UserError this rank waits for its end by the launcher: were it to end first, its peers would say in
    tracebacks that they lost it.
    """
    directory = os.environ.get(_REPORTS)
    if directory is None:
        srun.report(error)
        return False
    kind = "user" if isinstance(error, UserError) else type(error).__name__
    word = {"time": time.time(), "kind": kind, "message": " ".join(str(error).split())}
    path = Path(directory) / os.environ["RANK"]
    try:
        path.with_suffix(".part").write_text(json.dumps(word))
        path.with_suffix(".part").rename(path)
    except OSError:  # the temporary folder is full, or the launcher is gone
        return False
    if isinstance(error, UserError):
        time.sleep(GRACE_S)
    return True


def set_defaults() -> None:
    """What torch reads from the environment when it is imported, unless the user says otherwise: one thread a process
    where there is no GPU; on GPUs memory in segments that grow, since micro-batches of ever other sizes fragment it."""
    if not GPU_DRIVER.exists():
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    elif not any(name in os.environ for name in ALLOCATOR_VARIABLES):
        os.environ[ALLOCATOR_VARIABLES[0]] = GROWING_SEGMENTS


def _rank_environment(rank: int, processes: int, reports: str) -> dict[str, str]:
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    environment = {name: str(value) for name, value in here.items()} | {_LAUNCHER: str(os.getpid()), _REPORTS: reports}
    # As torchrun does; with more than one process, more threads each are slower.
    environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
    if sys.platform == "linux":
        # All ranks are here; a host name that does not resolve must not stop them.
        environment["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    return environment


def _free_address() -> dict[str, str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}


@contextlib.contextmanager
def _forwarding(children: list[subprocess.Popen[bytes]]) -> Iterator[list[signal.Signals]]:
    """While entered, signals go to the children; yields the list of those that came."""
    received: list[signal.Signals] = []

    def forward(number: int, _: FrameType | None) -> None:
        received.append(signal.Signals(number))
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    numbers = [number for number in FORWARDED if not is_ignored(number)]
    earlier: dict[signal.Signals, Any] = {number: signal.signal(number, forward) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in earlier.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _watch(children: list[subprocess.Popen[bytes]], received: list[signal.Signals], reports: Path) -> dict[int, _End]:
    """Wait until all have ended, or a grace after the first failure or an interrupt; those that ended by then."""
    ended: dict[int, _End] = {}
    deadline: float | None = None
    while True:
        for rank, child in enumerate(children):
            if rank not in ended and (code := child.poll()) is not None:
                ended[rank] = _End(code, time.time() - POLL_S)
        refused = any(word["kind"] == "user" for word in _reports(reports).values())
        if refused or len(ended) == len(children) or (deadline is not None and time.monotonic() > deadline):
            return ended
        if deadline is None and any(end.code for end in ended.values()):
            deadline = time.monotonic() + GRACE_S
        if deadline is None and signal.SIGINT in received:
            deadline = time.monotonic() + INTERRUPT_GRACE_S
        time.sleep(POLL_S)


def _kill(children: list[subprocess.Popen[bytes]]) -> None:
    """End what still runs, with the processes that it started."""
    for child in children:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
    for child in children:
        child.wait()


def _reports(directory: Path) -> dict[int, dict[str, Any]]:
    return {int(path.name): json.loads(path.read_text()) for path in directory.iterdir() if path.suffix == ""}


def _verdict(ended: dict[int, _End], received: list[signal.Signals], directory: Path) -> int:
    """Say which rank failed first, and why, in one line; the exit code."""
    if signal.SIGINT in received:
        return 128 + signal.SIGINT
    failed = {rank: end for rank, end in ended.items() if end.code}
    words = _reports(directory)
    if not failed and not words:
        return 0

    def failed_at(rank: int) -> float:
        if rank in words:
            return float(words[rank]["time"])
        # A crash leaves no word, and what its peers say of closed connections may be there before its end is seen.
        return 0.0 if -failed[rank].code in CRASHES else failed[rank].seen

    first = min({*failed, *words}, key=failed_at)
    code, word = failed[first].code if first in failed else 1, words.get(first)
    if word is not None and word["kind"] == "user":
        print(f"error: {word['message']}", file=sys.stderr)
        return 2
    if -code in received:
        return 128 - code
    if code < 0:
        why = f"was killed by {signal.Signals(-code).name}" + (" (out of memory?)" if code == -signal.SIGKILL else "")
    else:
        why = f"failed: {word['kind']}: {word['message']}" if word is not None else f"ended with exit code {code}"
    print(f"error: rank {first} {why}; the other ranks were ended", file=sys.stderr)
    return code if code > 0 else 128 - code
