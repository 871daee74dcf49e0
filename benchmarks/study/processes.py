"""Runs as forks of a process that has imported everything: a run starts in milliseconds, and gives way to all others.

Each is a session of its own, at nice 19 and its session's autogroup too, so that it takes only what nobody else wants.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

HEAVY = (
    "nemo_disco.commands.train",
    "nemo_disco.evaluation.report",
    "nemo_disco.evaluation.table",
    "transformers.models.qwen2.modeling_qwen2",  # transformers imports its models when they are asked for
)


def import_everything() -> None:
    from nemo_disco.runtime.logs import setup_logging

    setup_logging()  # the libraries warn while they are imported
    for name in HEAVY:
        importlib.import_module(name)


@dataclass
class Process:
    """A forked run, which leads its own process group."""

    name: str
    pid: int
    stopped: bool = False

    def pause(self, paused: bool) -> None:
        """Stop or continue it, and what it started."""
        if paused != self.stopped:
            with contextlib.suppress(ProcessLookupError):  # it does not lead its group yet, or has just ended
                os.killpg(self.pid, signal.SIGSTOP if paused else signal.SIGCONT)
                self.stopped = paused

    def give_way(self) -> None:
        """Lower the sessions of what it started: a new session begins with an autogroup of full weight."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.pid).children(recursive=True):
                lower(child.pid)

    def kill(self) -> None:
        """Kill the run; its children end with their pipes. Does not wait: at its priority it may take long to die."""
        os.kill(self.pid, signal.SIGKILL)


def fork(name: str, work: Callable[[], None], log: Path) -> Process:
    """work() in a child whose output goes to `log`; its exit code is 0, or 1 with the traceback in the log."""
    pid = os.fork()
    if pid:
        return Process(name, pid)
    code = 1
    try:
        os.setsid()
        os.nice(19 - os.nice(0))
        lower(os.getpid())
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for descriptor in (1, 2):
            os.dup2(out, descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def lower(pid: int) -> None:
    """The lowest weight among sessions; nothing where the kernel does not group by session."""
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/autogroup").write_text("19")
