"""A user's reward code in processes that can be killed: one call each at a time, given up after a time limit.

The processes run user_process.py and alone import the user's module. Knows nothing of what is judged.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
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
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nemo_disco
from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.signals import StoppedError, seconds_since_stop, spared_children

START_S = 600.0  # to import the module, and again to build the class
POLL_S = 0.1
_files: dict[str, str] = {}  # of what was described, by name
log = logging.getLogger(__name__)
Process = subprocess.Popen[bytes]
Idle = queue.SimpleQueue[Process]


@dataclass(frozen=True)
class UserCode:
    """What `module:name` is, as a process that imported it says.

    kind: function, class, callable (any other object that can be called), or the name of its type. takes: the names of
    a class's parameters. file: of its module.
    """

    kind: str
    takes: list[str]
    file: str


def describe(key: str, name: str) -> UserCode:
    """Import `module:name`, the value of a configuration's key, in a process that then ends, and say what it is.

    Raises UserError where there is none, for what its import raises, and if that takes longer than START_S.
    """
    process, code = _imported(key, name, lambda: False)
    _kill(process)
    _files[name] = code.file
    return code


def source_hash(name: str) -> str:
    """Of the file that holds `module:name`, once it was described; what that file imports is not looked at."""
    file = _files.get(name)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""


def rank_workers(workers: int) -> int:
    """This rank's share of `reward.workers`, which is a node's; at least 1."""
    return max(1, workers // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


class UserPool:
    """Calls `name`, module:function or module:class, in at most `workers` processes, each call within `timeout`
    seconds by the clock. A request to stop (signals.StopRequest) leaves all calls together `grace` seconds more."""

    def __init__(
        self,
        key: str,
        name: str,
        workers: int,
        timeout: float,
        settings: dict[str, Any] | None = None,
        grace: float | None = None,
    ) -> None:
        """key: of the configuration, for messages. settings: what each process builds a class with; None: a function.
        grace: None is `timeout`.

        Nothing is started before the first call. The processes end with `close`, or with this object.
        """
        self._grace, self._closed = timeout if grace is None else grace, False
        self._key, self._name, self._timeout, self._settings = key, name, timeout, settings
        self._threads = ThreadPoolExecutor(workers, f"user code {name}")
        self._idle: Idle = queue.SimpleQueue()
        self._late, self._lock = 0, threading.Lock()
        self._end = weakref.finalize(self, _end_all, self._threads, self._idle)

    def submit(self, *args: object) -> Future[Any]:
        """The future result: a function's number, or what a class's method returned; None where it took longer than
        the time limit, which is said. args: a function's, or a class's method and what it takes.

        It raises UserError for what the user's code raises, for what is no finite number, and if its process dies;
        StoppedError where there was no time left after a request to stop.
        """
        return self._threads.submit(self._call, args)

    def close(self) -> None:
        """End the processes; calls that have not begun are not made."""
        self._closed = True
        self._threads.shutdown(cancel_futures=True)
        self._end()

    def _call(self, args: object) -> Any:
        if self._stopped():
            raise StoppedError("nobody waits for it any more")
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

    def _start(self) -> Process:
        process, _ = _imported(self._key, self._name, self._stopped)
        if self._ask(process, self._settings, START_S) is None:
            raise UserError(f"{self._key}={self._name}: it was not ready to be called after {START_S:g} s")
        return process

    def _ask(self, process: Process, request: object, seconds: float) -> dict[str, Any] | None:
        """Its reply. None where it is late; then, and before anything is raised, it is killed."""
        assert process.stdin is not None
        with contextlib.suppress(OSError):  # it ended, which its reply will say
            process.stdin.write(base64.b64encode(pickle.dumps(request)) + b"\n")
            process.stdin.flush()
        return _reply(self._key, self._name, process, seconds, self._stopped)

    def _stopped(self) -> bool:
        """Whether nobody waits for results any more."""
        asked = seconds_since_stop()
        return self._closed or (asked is not None and asked > self._grace)

    def _say_late(self) -> None:
        with self._lock:
            self._late += 1
            late = self._late
        if late & (late - 1) == 0:  # the first, second, fourth, ...
            words = "%s=%s took longer than reward.timeout allows (%g s) and was given up, with 0: %d so far"
            log.warning(words, self._key, self._name, self._timeout, late)


def _imported(key: str, name: str, stopped: Callable[[], bool]) -> tuple[Process, UserCode]:
    """A process that has imported the user's module, to be asked for a class to build or None and then for calls."""
    root = str(Path(nemo_disco.__file__).parents[1])
    path = os.pathsep.join([*(entry for entry in sys.path if entry), root])
    with spared_children():
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "nemo_disco.rewards.user_process", key, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": path},
            start_new_session=True,  # it is killed with what it started, and Ctrl-C reaches the parent alone
        )
    reply = _reply(key, name, process, START_S, stopped)
    if reply is None:
        raise UserError(f"{key}={name}: its import was not done after {START_S:g} s")
    return process, UserCode(**reply["value"])


def _reply(key: str, name: str, process: Process, seconds: float, stopped: Callable[[], bool]) -> dict[str, Any] | None:
    """The process's next reply; None if it is late. Then, and before anything is raised, it is killed.

    Raises UserError for what the user's code raised and if the process ended, StoppedError once `stopped` says so.
    """
    try:
        line = _line(process, seconds, stopped)
    except BaseException:
        _kill(process)
        raise
    if not line:
        _kill(process)
    if line is None:
        return None
    if line == b"":
        raise UserError(f"{key}={name} ended its process with {process.returncode}, without a result")
    reply: dict[str, Any] = json.loads(line)
    if "error" in reply:
        _kill(process)
        raise UserError(reply["error"])
    return reply


def _line(process: Process, seconds: float, stopped: Callable[[], bool]) -> bytes | None:
    """The process's next line, b"" if it ended, None if it is late. Raises StoppedError once `stopped` says so."""
    assert process.stdout is not None
    deadline = time.monotonic() + seconds
    while True:
        left = deadline - time.monotonic()
        if select.select([process.stdout], [], [], min(POLL_S, max(left, 0)))[0]:
            return process.stdout.readline()
        if stopped():
            raise StoppedError("nobody waits for it any more")
        if left <= 0:
            return None


def _end_all(threads: ThreadPoolExecutor, idle: Idle) -> None:
    threads.shutdown(wait=False, cancel_futures=True)
    while not idle.empty():
        _kill(idle.get())


def _kill(process: Process) -> None:
    """It, and what it started."""
    assert process.stdin is not None and process.stdout is not None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    with contextlib.suppress(OSError):  # what it did not read
        process.stdin.close()
