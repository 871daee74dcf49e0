"""The trainer's side of the sandbox: starts its server (sandbox_server.py), hands it programs, reads what they printed.

What must stay secret never enters the server: outputs are compared by the caller, and this process's memory is closed
to others of its user while a program runs.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_disco.rewards.code.seccomp_filter import filter_program
from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.signals import spared_children

SERVER = Path(__file__).with_name("sandbox_server.py")
_FILES = ("job", "stdin", "stdout", "stderr", "report")
_COMPLAINT = 4000  # bytes of what a program wrote to stderr that are kept
_START, _GRACE = 60.0, 60.0  # seconds for the server to start, and to answer beyond a program's own limits
# The server's whole environment. One hash seed: a program's order of a set, and so its reward, is the same in each run.
_ENVIRONMENT = {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "MALLOC_ARENA_MAX": "1"}
_ENVIRONMENT |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
_GET_DUMPABLE, _SET_DUMPABLE = 3, 4


@dataclass(frozen=True)
class Limits:
    """seconds: of processor time, and as many asleep; memory: bytes beyond Python's own; output: bytes a file."""

    seconds: float
    memory: int
    output: int
    asleep: float


@dataclass(frozen=True)
class Ended:
    """How a program ended.

    code: its exit code, negative for a signal; late: whether its time was up; spent and asleep: seconds; report: what
    was returned by calls.
    """

    code: int
    late: bool
    spent: float
    asleep: float
    printed: bytes
    complaint: str
    report: bytes


class ForkServer:
    """One confined program at a time, each in a process forked from a Python that is loaded. Not thread-safe."""

    def __init__(self, *, landlock: bool = True) -> None:
        """landlock: whether the kernel's Landlock is used where it is there (tests leave it out).

        The server starts with the first program.
        """
        self._landlock = landlock
        self._files = {name: os.memfd_create(name) for name in _FILES}
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None

    def run(
        self,
        job: bytes,
        limits: Limits,
        *,
        stdin: bytes | None = None,
        preload: tuple[str, ...] = (),
        link: socket.socket | None = None,
    ) -> Ended:
        """Run the job (see confined_process.py); with `stdin` None it reads nothing and what it prints is dropped.

        link: this job's end of the socket between a program and its tests; it is closed here once the job has it.
        Raises UserError where the kernel does not confine it, RuntimeError where the server died twice (with a link:
        once, since the other end has then ended too).
        """
        for name, data in (("job", job), ("stdin", stdin or b""), ("stdout", b""), ("stderr", b""), ("report", b"")):
            os.ftruncate(self._files[name], 0)
            _write(self._files[name], data)
        request = {"seconds": limits.seconds, "asleep": limits.asleep, "memory": limits.memory, "output": limits.output}
        closed = ["stdin", "stdout"] if stdin is None else []
        message = json.dumps(request | {"closed": closed, "preload": preload}).encode()
        with _private_memory():
            outcome = self._ask(message, limits, link)
            if outcome is None and link is None:
                outcome = self._ask(message, limits)
        if outcome is None:
            raise RuntimeError("the sandbox's server ended at one program; what it printed above says why")
        if outcome["problem"]:
            raise _unconfined(outcome["problem"])
        return Ended(
            code=os.waitstatus_to_exitcode(outcome["status"]),
            late=outcome["late"],
            spent=outcome["spent"],
            asleep=outcome["asleep"],
            printed=_read(self._files["stdout"], limits.output),
            complaint=_read(self._files["stderr"], limits.output)[-_COMPLAINT:].decode(errors="replace"),
            report=_read(self._files["report"], limits.output),
        )

    def close(self) -> None:
        """End the server, and with it the program that runs."""
        self._end()
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files = {}

    def _ask(self, message: bytes, limits: Limits, link: socket.socket | None = None) -> dict[str, Any] | None:
        """The server's answer; None where it died, or answers no more."""
        try:
            channel = self._started()
            channel.settimeout(10 * limits.seconds + _GRACE)
            if link is None:
                channel.send(message)
            else:
                with link:
                    socket.send_fds(channel, [message], [link.fileno()])
            if answer := channel.recv(1 << 16):
                return _mapping(answer)
        except OSError:  # a timeout too
            pass
        self._end()
        return None

    def _started(self) -> socket.socket:
        if self._channel is not None and self._process is not None and self._process.poll() is None:
            return self._channel
        self._end()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, spared_children():
            settings = {"channel": theirs.fileno(), "files": self._files, "landlock": self._landlock}
            settings["filter"] = filter_program().hex()
            loader = {k: v for k, v in os.environ.items() if k == "LD_LIBRARY_PATH"}  # some clusters' Python needs it
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-s", str(SERVER), json.dumps(settings)],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, cwd="/", env=_ENVIRONMENT | loader,
                pass_fds=(theirs.fileno(), *self._files.values()),
                start_new_session=True,  # Ctrl-C in the terminal reaches the trainer alone
            )  # fmt: skip
        self._channel = ours
        ours.settimeout(_START)
        hello = ours.recv(1 << 16)
        said = _mapping(hello) if hello else {"problem": f"its server ended with {self._process.wait()}"}
        if said["problem"]:
            self._end()
            raise _unconfined(str(said["problem"]), said.get("unreadable") is True)
        return ours

    def _end(self) -> None:
        channel, self._channel = self._channel, None
        process, self._process = self._process, None
        if channel is not None:
            channel.close()
        if process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(2.0 if process.poll() is None else 0.0)
            process.kill()
            process.wait()


_running = 0
_earlier = 1
_running_lock = threading.Lock()


@contextlib.contextmanager
def _private_memory() -> Iterator[None]:
    """While programs run, no process of the same user may read this one's memory or environment, or trace it.

    Not for longer: profilers, core dumps and some GPU libraries want to.
    """
    global _running, _earlier
    libc = ctypes.CDLL(None)
    with _running_lock:
        if _running == 0:
            _earlier = libc.prctl(_GET_DUMPABLE, 0, 0, 0, 0)
        _running += 1
        libc.prctl(_SET_DUMPABLE, 0, 0, 0, 0)
    try:
        yield
    finally:
        with _running_lock:
            _running -= 1
            if _running == 0 and _earlier == 1:  # 2 cannot be set by hand
                libc.prctl(_SET_DUMPABLE, 1, 0, 0, 0)


def _unconfined(problem: str, unreadable: bool = False) -> UserError:
    needs = (
        "it needs Linux with seccomp on x86_64 or aarch64, and in a container a profile that lets a process add filters"
    )
    if unreadable:
        needs = (
            "programs of a run of root's are run as nobody: install Python where every user can read it, such as /opt, "
            "start the run as another user than root, or use a kernel with Landlock (Linux 5.13)"
        )
    return UserError(f"reward.verifier=python_tests: this machine cannot confine a program ({problem}); {needs}")


def _mapping(message: bytes) -> dict[str, Any]:
    mapping: dict[str, Any] = json.loads(message)
    return mapping


def _write(descriptor: int, data: bytes) -> None:
    offset = 0
    while offset < len(data):
        offset += os.pwrite(descriptor, data[offset:], offset)


def _read(descriptor: int, limit: int) -> bytes:
    content = bytearray()
    while len(content) < limit and (chunk := os.pread(descriptor, limit - len(content), len(content))):
        content += chunk
    return bytes(content)
