"""Runs a user's reward code in processes that can be killed, one call at a time in each, with a time limit per call.

The trainer's side. The processes (user_process.py) import the user's module, which this process never does.
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
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nemo_disco
from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.stop_signals import StoppedError, seconds_since_stop, shield_children

START_S = 600.0  # limit for importing the module, and again for building the class
POLL_S = 0.1
log = logging.getLogger(__name__)
Process = subprocess.Popen[bytes]
Idle = queue.SimpleQueue[Process]


@dataclass(frozen=True)
class CodeDescription:
    """Description of `module:name` by a process that imported it.

    kind: function, class, callable (any other object that can be called), or its type. parameters: names of a class's.
    """

    kind: str
    parameters: list[str]


def describe_code(key: str, name: str) -> CodeDescription:
    """Import `module:name`, the value of a configuration's `key`, in a process that then ends, and describe it.

    Raises UserError if there is none, if its import raises, or if that takes longer than START_S.
    """
    process, code = _start_process(key, name, lambda: False)
    _kill(process)
    return code


def rank_workers(workers: int) -> int:
    """This rank's share of its node's `reward.workers`, at least 1."""
    return max(1, workers // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


class UserPool:
    """Calls `name`, module:function or module:class, in at most `workers` processes, each call within `timeout` seconds
    by the clock. After a request to stop (StopRequest) all calls together may take `grace` seconds more."""

    def __init__(
        self,
        key: str,
        name: str,
        workers: int,
        timeout: float,
        settings: dict[str, Any] | None = None,
        grace: float | None = None,
    ) -> None:
        """key: the setting with `name`. settings: a class's arguments, None for a function. grace: None is `timeout`.

        Processes start with the first calls and end with `close`, or with this object.
        """
        self._grace, self._closed = timeout if grace is None else grace, False
        self._key, self._name, self._timeout, self._settings = key, name, timeout, settings
        self._threads = ThreadPoolExecutor(workers, f"user code {name}")
        self._idle: Idle = queue.SimpleQueue()
        self._timeouts, self._lock = 0, threading.Lock()
        self._finalizer = weakref.finalize(self, _end_all, self._threads, self._idle)

    def submit(self, *args: object) -> Future[Any]:
        """Future of one call: a function's number or a class's (reward, reason); None, with a warning, after `timeout`.

        args: those of a function, or a class's method and its arguments. The future raises UserError if the user's code
        raises, returns no finite number or ends its process, StoppedError once `grace` is over.
        """
        return self._threads.submit(self._call, args)

    def close(self) -> None:
        """End the processes and cancel the calls that have not begun."""
        self._closed = True
        self._threads.shutdown(cancel_futures=True)
        self._finalizer()

    def _call(self, args: object) -> Any:
        if self._is_stopped():
            raise StoppedError("the run stops: the user's code is not called any more")
        try:
            process = self._idle.get_nowait()
        except queue.Empty:
            process = self._start()
        reply = self._request(process, args, self._timeout)
        if reply is None:
            self._warn_timeout()
            return None
        self._idle.put(process)
        return reply["value"]

    def _start(self) -> Process:
        process, _ = _start_process(self._key, self._name, self._is_stopped)
        if self._request(process, self._settings, START_S) is None:
            raise UserError(f"{self._key}={self._name}: its class was not built within {START_S:g} s")
        return process

    def _request(self, process: Process, request: object, seconds: float) -> dict[str, Any] | None:
        """Send a request and return its reply, as `_read_reply`."""
        assert process.stdin is not None
        with contextlib.suppress(OSError):  # the process ended, which `_read_reply` reports
            process.stdin.write(base64.b64encode(pickle.dumps(request)) + b"\n")
            process.stdin.flush()
        return _read_reply(f"{self._key}={self._name}", process, seconds, self._is_stopped)

    def _is_stopped(self) -> bool:
        """True once results are not needed any more."""
        seconds = seconds_since_stop()
        return self._closed or (seconds is not None and seconds > self._grace)

    def _warn_timeout(self) -> None:
        with self._lock:
            self._timeouts += 1
            count = self._timeouts
        if count & (count - 1) == 0:  # the first, second, fourth, ...
            message = "%s=%s took longer than reward.timeout allows (%g s); its reward is 0: %d such calls so far"
            log.warning(message, self._key, self._name, self._timeout, count)


def _start_process(key: str, name: str, is_stopped: Callable[[], bool]) -> tuple[Process, CodeDescription]:
    """Start a process that imports the user's module. Its first request must be a class's arguments or None."""
    root = str(Path(nemo_disco.__file__).parents[1])
    path = os.pathsep.join([*(entry for entry in sys.path if entry), root])
    with shield_children():
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "nemo_disco.rewards.user_process", key, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": path},
            start_new_session=True,  # a group, to kill with all that it started; Ctrl-C reaches the parent alone
        )
    reply = _read_reply(f"{key}={name}", process, START_S, is_stopped)
    if reply is None:
        raise UserError(f"{key}={name}: its import took longer than {START_S:g} s")
    return process, CodeDescription(**reply["value"])


def _read_reply(code: str, process: Process, seconds: float, is_stopped: Callable[[], bool]) -> dict[str, Any] | None:
    """The process's next reply; None after `seconds`. In that case, and before an error is raised, it is killed.

    Raises UserError if the user's code raised or the process ended, StoppedError once `is_stopped()`.
    """
    try:
        line = _read_line(process, seconds, is_stopped)
    except BaseException:
        _kill(process)
        raise
    if not line:
        _kill(process)
    if line is None:
        return None
    if line == b"":
        raise UserError(f"{code} ended its process with exit code {process.returncode}, without a result")
    reply: dict[str, Any] = json.loads(line)
    if "error" in reply:
        _kill(process)
        raise UserError(reply["error"])
    return reply


def _read_line(process: Process, seconds: float, is_stopped: Callable[[], bool]) -> bytes | None:
    """The process's next line, b"" if it ended, None after `seconds`. Raises StoppedError once `is_stopped()`."""
    assert process.stdout is not None
    deadline = time.monotonic() + seconds
    while True:
        remaining = deadline - time.monotonic()
        if select.select([process.stdout], [], [], min(POLL_S, max(remaining, 0)))[0]:
            return process.stdout.readline()
        if is_stopped():
            raise StoppedError("the run stops: the user's code is not waited for any more")
        if remaining <= 0:
            return None


def _end_all(threads: ThreadPoolExecutor, idle: Idle) -> None:
    threads.shutdown(wait=False, cancel_futures=True)
    while not idle.empty():
        _kill(idle.get())


def _kill(process: Process) -> None:
    """Kill the process and all that it started."""
    assert process.stdin is not None and process.stdout is not None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    with contextlib.suppress(OSError):  # it did not read all its input
        process.stdin.close()
