"""The parent's side of the grader's process: any thread submits answers and gets futures of reasons.

Starts the process at the first answer, restarts it if it dies, ends it with the parent. Knows nothing of mathematics.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import nemo_disco
from nemo_disco.rewards import verdict
from nemo_disco.runtime.signals import spared_children

ATTEMPTS = 2  # an answer that was in the process twice when it died is given up


class WorkerPool:
    """Judges answers in at most `workers` processes at once, each answer within `timeout` seconds of processor time."""

    def __init__(self, workers: int, timeout: float) -> None:
        self._workers = workers
        self._timeout = timeout
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._waiting: dict[int, tuple[Future[str], dict[str, Any]]] = {}
        self._count = 0
        self._closed = False

    def submit(self, answer: str, golds: Sequence[str]) -> Future[str]:
        """The future reason of the verdict on one answer, given in canonical LaTeX without its unit.

        The future raises RuntimeError if the process cannot be started at all.
        """
        future: Future[str] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("the grader is closed")
            self._count += 1
            job = {"id": self._count, "answer": answer, "golds": list(golds), "timeout": self._timeout, "attempts": 0}
            self._waiting[self._count] = (future, job)
            if self._process is None:
                self._start()
            else:
                self._send(job)
        return future

    def close(self) -> None:
        """End the process; answers still being judged get CancelledError."""
        with self._lock:
            self._closed = True
            process, self._process = self._process, None
            waiting, self._waiting = self._waiting, {}
        if process is not None:
            atexit.unregister(self.close)
            _end(process)
        for future, _ in waiting.values():
            future.cancel()

    def _start(self) -> None:
        """Start the process and give it all that waits. The lock is held."""
        root = str(Path(nemo_disco.__file__).parents[1])
        path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), root]))
        # -P: no sympy.py of the user's directory is imported. One hash seed: terms have one order in every process.
        with spared_children():  # a judge that a request to stop ended would look like a wrong answer
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "nemo_disco.rewards.math.algebra_process", str(self._workers)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | {"PYTHONPATH": path, "PYTHONHASHSEED": "0"},
                start_new_session=True,  # Ctrl-C in the terminal reaches the parent alone
            )
        atexit.unregister(self.close)
        atexit.register(self.close)
        threading.Thread(target=self._listen, args=(self._process,), name="grader", daemon=True).start()
        for _, job in self._waiting.values():
            self._send(job)

    def _send(self, job: dict[str, Any]) -> None:
        assert self._process is not None and self._process.stdin is not None
        with contextlib.suppress(OSError):  # it just died: _listen sees that too, and starts the next one with this job
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()

    def _listen(self, process: subprocess.Popen[str]) -> None:
        """The reader thread of one process: resolves futures until the process ends."""
        assert process.stdout is not None
        ready = False
        for line in process.stdout:
            message = json.loads(line)
            if "ready" in message:
                ready = True
                continue
            future, _ = self._waiting.pop(message["id"], (None, None))  # no lock: a sender may hold it until we read on
            if future is not None:
                future.set_result(message["reason"])
        with self._lock:
            if self._process is not process:
                return  # closed on purpose
            self._process = None
            resolved = self._after_death(ready)
        _end(process)
        for future, outcome in resolved:
            if isinstance(outcome, str):
                future.set_result(outcome)
            else:
                future.set_exception(outcome)

    def _after_death(self, was_ready: bool) -> list[tuple[Future[str], str | RuntimeError]]:
        """Try again what was not answered, once; returns what is given up. The lock is held."""
        given_up: list[tuple[Future[str], str | RuntimeError]] = []
        for key, (future, job) in list(self._waiting.items()):
            job["attempts"] += 1
            if not was_ready:
                error = RuntimeError("the grader's process did not start; what it printed above says why")
                given_up.append((future, error))
            elif job["attempts"] == ATTEMPTS:
                given_up.append((future, verdict.DIED))
            else:
                continue
            del self._waiting[key]
        if self._waiting:
            self._start()
        return given_up


def _end(process: subprocess.Popen[str]) -> None:
    """The process ends its children and itself when its input closes; killed if it does not."""
    assert process.stdin is not None
    with contextlib.suppress(OSError):  # unsent input of a dead process
        process.stdin.close()
    try:
        process.wait(timeout=2)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
