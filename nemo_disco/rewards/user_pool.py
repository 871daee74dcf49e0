"""A user's reward code in processes that can be killed: one call each at a time, given up after a time limit.

The processes run user_process.py. Knows nothing of what is judged.
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import os
import pickle
import queue
import select
import signal
import subprocess
import sys
import threading
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nemo_disco
from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.signals import spared_children

START_S = 600.0  # until the module is imported and the class is built
log = logging.getLogger(__name__)
Idle = queue.SimpleQueue["subprocess.Popen[bytes]"]


def rank_workers(workers: int) -> int:
    """This rank's share of `reward.workers`, which is a node's; at least 1."""
    return max(1, workers // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


class UserPool:
    """Calls `name`, module:function or module:class, in at most `workers` processes, each call within `timeout`
    seconds by the clock."""

    def __init__(
        self, key: str, name: str, workers: int, timeout: float, settings: dict[str, Any] | None = None
    ) -> None:
        """key: of the configuration, for messages. settings: what each process builds a class with; None: a function.

        Nothing is started before the first call. The processes end with `close`, or with this object.
        """
        self._key, self._name, self._timeout, self._settings = key, name, timeout, settings
        self._threads = ThreadPoolExecutor(workers, f"user code {name}")
        self._idle: Idle = queue.SimpleQueue()
        self._late, self._lock = 0, threading.Lock()
        self._end = weakref.finalize(self, _end_all, self._threads, self._idle)

    def submit(self, *args: object) -> Future[Any]:
        """The future result: a function's number, or what a class's method returned; None where it took longer than
        the time limit, which is said. args: a function's, or a class's method and what it takes.

        It raises UserError for what the user's code raises, for what is no finite number, and if its process dies.
        """
        return self._threads.submit(self._call, args)

    def close(self) -> None:
        """End the processes; calls that have not begun are not made."""
        self._threads.shutdown(cancel_futures=True)
        self._end()

    def _call(self, args: object) -> Any:
        try:
            process = self._idle.get_nowait()
        except queue.Empty:
            process = self._start()
        reply = self._ask(process, args, self._timeout)
        if reply is None:
            self._say_late()
            return None
        self._idle.put(process)
        return reply["value"]

    def _start(self) -> subprocess.Popen[bytes]:
        root = str(Path(nemo_disco.__file__).parents[1])
        path = os.pathsep.join([*(entry for entry in sys.path if entry), root])
        with spared_children():
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "nemo_disco.rewards.user_process", self._key, self._name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=os.environ | {"PYTHONPATH": path},
                start_new_session=True,  # it is killed with what it started, and Ctrl-C reaches the parent alone
            )
        if self._ask(process, self._settings, START_S) is None:
            raise UserError(f"{self._key}={self._name}: it was not ready to be called after {START_S:g} s")
        return process

    def _ask(self, process: subprocess.Popen[bytes], request: object, seconds: float) -> dict[str, Any] | None:
        """Its reply. None where it is late; then, and before anything is raised, it is killed."""
        assert process.stdin is not None
        try:
            process.stdin.write(base64.b64encode(pickle.dumps(request)) + b"\n")
            process.stdin.flush()
            line = _line(process, seconds)
        except OSError:
            line = b""
        if not line:
            _kill(process)
        if line == b"":
            code = process.returncode
            raise UserError(f"{self._key}={self._name} ended its process with {code}, without a result")
        if line is None:
            return None
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            _kill(process)
            raise UserError(reply["error"])
        return reply

    def _say_late(self) -> None:
        with self._lock:
            self._late += 1
            late = self._late
        if late & (late - 1) == 0:  # the first, second, fourth, ...
            words = "%s=%s took longer than reward.timeout allows (%g s) and was given up, with 0: %d so far"
            log.warning(words, self._key, self._name, self._timeout, late)


def _line(process: subprocess.Popen[bytes], seconds: float) -> bytes | None:
    """The process's next line, b"" if it ended, None if it is late."""
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], seconds)
    return process.stdout.readline() if ready else None


def _end_all(threads: ThreadPoolExecutor, idle: Idle) -> None:
    threads.shutdown(wait=False, cancel_futures=True)
    while not idle.empty():
        _kill(idle.get())


def _kill(process: subprocess.Popen[bytes]) -> None:
    """It, and what it started."""
    assert process.stdin is not None and process.stdout is not None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    with contextlib.suppress(OSError):  # what it did not read
        process.stdin.close()
