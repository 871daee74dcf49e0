"""A user's function in processes that can be killed: one call each at a time, given up after a time limit.

Run as `python -m nemo_disco.rewards.user_pool KEY NAME` it is such a process. Knows nothing of what is judged.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
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
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nemo_disco
from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.signals import spared_children
from nemo_disco.runtime.user_code import called, load

START_S = 600.0  # until the function's module is imported
PR_SET_PDEATHSIG = 1
log = logging.getLogger(__name__)


class UserPool:
    """Calls `name` (module:function) in at most `workers` processes, each call within `timeout` seconds by the
    clock."""

    def __init__(self, key: str, name: str, workers: int, timeout: float) -> None:
        """key: of the configuration, for messages. Nothing is started before the first call."""
        self._key, self._name, self._timeout = key, name, timeout
        self._threads = ThreadPoolExecutor(workers, f"user function {name}")
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        self._late, self._lock = 0, threading.Lock()

    def submit(self, *args: object) -> Future[float | None]:
        """The future number that the function returns; None where it took longer than the time limit, which is said.

        It raises UserError for what the function raises, for what is no finite number, and if its process dies.
        """
        return self._threads.submit(self._call, pickle.dumps(args))

    def close(self) -> None:
        """End the processes; calls that have not begun are not made."""
        self._threads.shutdown(cancel_futures=True)
        while not self._idle.empty():
            _kill(self._idle.get())

    def _call(self, args: bytes) -> float | None:
        try:
            process = self._idle.get_nowait()
        except queue.Empty:
            process = self._start()
        assert process.stdin is not None
        try:
            process.stdin.write(base64.b64encode(args) + b"\n")
            process.stdin.flush()
            reply = _reply(process, self._timeout)
        except OSError:
            reply = b""
        if reply is None:
            _kill(process)
            self._say_late()
            return None
        if not reply:
            _kill(process)
            raise UserError(f"{self._key}={self._name} ended its process with {process.returncode}, without a result")
        self._idle.put(process)
        said = json.loads(reply)
        if "error" in said:
            raise UserError(said["error"])
        return float(said["value"])

    def _start(self) -> subprocess.Popen[bytes]:
        root = str(Path(nemo_disco.__file__).parents[1])
        path = os.pathsep.join([*(entry for entry in sys.path if entry), root])
        with spared_children():
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", __name__, self._key, self._name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=os.environ | {"PYTHONPATH": path},
                start_new_session=True,  # it is killed with what it started, and Ctrl-C reaches the parent alone
            )
        if _reply(process, START_S) != b"ready\n":
            _kill(process)
            raise UserError(f"{self._key}={self._name}: its process did not start; what it printed above says why")
        return process

    def _say_late(self) -> None:
        with self._lock:
            self._late += 1
            late = self._late
        if late & (late - 1) == 0:  # the first, second, fourth, ...
            words = "%s=%s took longer than reward.timeout=%g s and was given up, with 0: %d so far"
            log.warning(words, self._key, self._name, self._timeout, late)


def _reply(process: subprocess.Popen[bytes], seconds: float) -> bytes | None:
    """The process's next line, b"" if it ended, None if it is late."""
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], seconds)
    return process.stdout.readline() if ready else None


def _kill(process: subprocess.Popen[bytes]) -> None:
    """It, and what it started."""
    assert process.stdin is not None and process.stdout is not None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    with contextlib.suppress(OSError):  # what it did not read
        process.stdin.close()


def main() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what the function prints is for people
    key, name = sys.argv[1:]
    function = load(key, name)
    replies.write(b"ready\n")
    for line in sys.stdin.buffer:
        try:
            said: dict[str, Any] = {"value": called(key, name, function, *pickle.loads(base64.b64decode(line)))}
        except UserError as error:
            said = {"error": str(error)}
        replies.write(json.dumps(said).encode() + b"\n")


if __name__ == "__main__":
    main()
