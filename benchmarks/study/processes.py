"""Processes of the study's runs: forks of one process that has imported all libraries, so they start in milliseconds.

Each leads a session of its own with the lowest priority (nice 19, and 19 for the session's autogroup, too), so that it
uses only the processor time that no other program wants.
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

SLOW_IMPORTS = (
    "nemo_disco.commands.train",
    "nemo_disco.evaluation.report",
    "nemo_disco.evaluation.table",
    "transformers.models.qwen2.modeling_qwen2",  # transformers imports a model's module only on first use
)


def import_everything() -> None:
    """Import the slow modules of a run, so that forked runs need not."""
    from nemo_disco.runtime.logs import setup_logging

    setup_logging()  # first, since libraries warn while they are imported
    for name in SLOW_IMPORTS:
        importlib.import_module(name)


@dataclass
class RunProcess:
    """The process of one run, which leads its own session and process group."""

    name: str
    pid: int
    stopped: bool = False

    def pause(self, paused: bool) -> None:
        """Stop the run and the processes that it started if `paused`, else let them continue."""
        if paused != self.stopped:
            with contextlib.suppress(ProcessLookupError):  # it does not lead its group yet, or has just ended
                os.killpg(self.pid, signal.SIGSTOP if paused else signal.SIGCONT)
                self.stopped = paused

    def lower_children(self) -> None:
        """Lower the priority of the processes that the run started: a new session's autogroup has normal priority."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.pid).children(recursive=True):
                lower_priority(child.pid)

    def kill(self) -> None:
        """Kill the run, without waiting until it has ended, which can be long at its priority.

        The processes that it started end by themselves when their pipes to it close.
        """
        os.kill(self.pid, signal.SIGKILL)


def fork_run(name: str, job: Callable[[], None], log: Path) -> RunProcess:
    """Call `job` in a forked process of lowest priority, whose output goes to the file `log`.

    Its exit code is 0, or 1 if `job` raised an exception; the traceback is then in the log.
    """
    pid = os.fork()
    if pid:
        return RunProcess(name, pid)
    code = 1
    try:
        os.setsid()
        os.nice(19 - os.nice(0))
        lower_priority(os.getpid())
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for descriptor in (1, 2):
            os.dup2(out, descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        job()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def lower_priority(pid: int) -> None:
    """Give the session of a process the lowest priority among sessions, if the kernel has autogroups."""
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/autogroup").write_text("19")
