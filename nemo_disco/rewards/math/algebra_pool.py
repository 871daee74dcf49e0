"""The trainer's side of the math grader's process (algebra_process.py): submits answers, returns futures of reasons.

Any thread may submit. Starts the process with the first answer, restarts it if it dies, ends it with the trainer.
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
from nemo_disco.runtime.stop_signals import shield_children

MAX_ATTEMPTS = 2  # an answer that was being judged when the process died is given up the second time


class AlgebraPool:
    """Judges answers in at most `workers` processes at once, each within `timeout` seconds of processor time."""

    def __init__(self, workers: int, timeout: float) -> None:
        self._workers = workers
        self._timeout = timeout
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._waiting: dict[int, tuple[Future[str], dict[str, Any]]] = {}
        self._count = 0
        self._closed = False

    def submit(self, answer: str, golds: Sequence[str]) -> Future[str]:
        """Future of the verdict's reason for one answer. answer, golds: canonical LaTeX without units.

        The future raises RuntimeError if the process cannot be started.
        """
        future: Future[str] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("the math grader is closed and cannot grade")
            self._count += 1
            job = {"id": self._count, "answer": answer, "golds": list(golds), "timeout": self._timeout, "attempts": 0}
            self._waiting[self._count] = (future, job)
            if self._process is None:
                self._start()
            else:
                self._send(job)
        return future

    def close(self) -> None:
        """End the process and cancel the futures of unjudged answers."""
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
        """Start the process and send it all waiting answers. The caller holds the lock."""
        root = str(Path(nemo_disco.__file__).parents[1])
        path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), root]))
        # -P: import no sympy.py of the working directory. One hash seed: sympy orders terms the same in every process.
        with shield_children():  # if a request to stop ended them, their answers would count as wrong
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "nemo_disco.rewards.math.algebra_process", str(self._workers)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | {"PYTHONPATH": path, "PYTHONHASHSEED": "0"},
                start_new_session=True,  # Ctrl-C in the terminal reaches the trainer alone
            )
        atexit.unregister(self.close)
        atexit.register(self.close)
        threading.Thread(target=self._listen, args=(self._process,), name="grader", daemon=True).start()
        for _, job in self._waiting.values():
            self._send(job)

    def _send(self, job: dict[str, Any]) -> None:
        assert self._process is not None and self._process.stdin is not None
        with contextlib.suppress(OSError):  # it just died: _listen notices, and starts the next one with this job
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()

    def _listen(self, process: subprocess.Popen[str]) -> None:
        """Resolve futures from the process's replies until it ends. Each process has a thread for this."""
        assert process.stdout is not None
        ready = False
        for line in process.stdout:
            message = json.loads(line)
            if "ready" in message:
                ready = True
                continue
            future, _ = self._waiting.pop(message["id"], (None, None))  # no lock: _send may wait for us to read on
            if future is not None:
                future.set_result(message["reason"])
        with self._lock:
            if self._process is not process:
                return  # ended by `close`
            self._process = None
            failures = self._retry(ready)
        _end(process)
        for future, outcome in failures:
            if isinstance(outcome, str):
                future.set_result(outcome)
            else:
                future.set_exception(outcome)

    def _retry(self, was_ready: bool) -> list[tuple[Future[str], str | RuntimeError]]:
        """Restart the dead process and return the answers that it must not get again: those with MAX_ATTEMPTS, and all
        if it was never ready. The caller holds the lock."""
        failures: list[tuple[Future[str], str | RuntimeError]] = []
        for key, (future, job) in list(self._waiting.items()):
            job["attempts"] += 1
            if not was_ready:
                error = RuntimeError("the math grader's process did not start; its messages above say why")
                failures.append((future, error))
            elif job["attempts"] == MAX_ATTEMPTS:
                failures.append((future, verdict.DIED))
            else:
                continue
            del self._waiting[key]
        if self._waiting:
            self._start()
        return failures


def _end(process: subprocess.Popen[str]) -> None:
    """Close the process's input, at which it ends its children and itself; kill it after 2 s."""
    assert process.stdin is not None
    with contextlib.suppress(OSError):  # unsent input of a dead process
        process.stdin.close()
    try:
        process.wait(timeout=2)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
