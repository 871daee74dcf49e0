"""The trainer's side of the sandbox: starts its server (sandbox_server.py), sends it jobs, reads the programs' output.

Expected outputs never enter the server: the caller compares them. While a program runs, this process's memory is closed
to all other processes of its user.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nemo_disco.rewards.code.seccomp_filter import build_filter
from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.stop_signals import shield_children

_SERVER = Path(__file__).with_name("sandbox_server.py")
_FILES = ("job", "stdin", "stdout", "stderr", "report")  # in memory; the server and its programs inherit them
_STDERR_BYTES = 4000  # the end of a program's stderr that is returned
_START_S, _GRACE_S = 60.0, 60.0  # for the server to start, and to reply beyond a program's own limits
# The server's whole environment. One hash seed: a set's order in a program, and so its reward, is the same in each run.
_ENVIRONMENT = {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "MALLOC_ARENA_MAX": "1"}
_ENVIRONMENT |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
_GET_DUMPABLE, _SET_DUMPABLE = 3, 4


@dataclass(frozen=True)
class Limits:
    """Limits of one program. memory_bytes: beyond Python's own; output_bytes: of each file that it writes to."""

    cpu_seconds: float
    sleep_seconds: float
    memory_bytes: int
    output_bytes: int


@dataclass(frozen=True)
class Outcome:
    """Result of one job.

    exit_code: negative for a signal. report: the values of calls or expressions as JSON, or the token of passed tests.
    """

    exit_code: int
    timed_out: bool
    cpu_seconds: float
    sleep_seconds: float
    stdout: bytes
    stderr: str
    report: bytes


class Sandbox:
    """Runs one confined program at a time, each in a process that the sandbox's server forks. Not thread-safe."""

    def __init__(self, *, landlock: bool = True) -> None:
        """landlock: use the kernel's Landlock if it has it (False in tests). The server starts with the first job."""
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
    ) -> Outcome:
        """Run the job (see confined_process.py); with `stdin` None it reads nothing and its output is dropped.

        preload: modules that the server imports first. link: the job's end of the socket between a program and its
        tests; closed here once the job has it. Raises UserError if the kernel does not confine the process,
        RuntimeError if the server died twice (with a link once, since the other end's process has then ended too).
        """
        for name, data in (("job", job), ("stdin", stdin or b""), ("stdout", b""), ("stderr", b""), ("report", b"")):
            os.ftruncate(self._files[name], 0)
            _write(self._files[name], data)
        closed = ["stdin", "stdout"] if stdin is None else []
        message = json.dumps(asdict(limits) | {"closed": closed, "preload": preload}).encode()
        with _private_memory():
            reply = self._request(message, limits, link)
            if reply is None and link is None:
                reply = self._request(message, limits)
        if reply is None:
            raise RuntimeError("the sandbox's server died while a program ran; its messages above say why")
        if reply["problem"]:
            raise _confinement_error(reply["problem"])
        return Outcome(
            exit_code=os.waitstatus_to_exitcode(reply["status"]),
            timed_out=reply["timed_out"],
            cpu_seconds=reply["cpu_seconds"],
            sleep_seconds=reply["sleep_seconds"],
            stdout=_read(self._files["stdout"], limits.output_bytes),
            stderr=_read(self._files["stderr"], limits.output_bytes)[-_STDERR_BYTES:].decode(errors="replace"),
            report=_read(self._files["report"], limits.output_bytes),
        )

    def close(self) -> None:
        """End the server, and with it any program that runs."""
        self._stop_server()
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files = {}

    def _request(self, message: bytes, limits: Limits, link: socket.socket | None = None) -> dict[str, Any] | None:
        """The server's reply; None if it died, or sent none in time and was ended."""
        try:
            channel = self._connect()
            channel.settimeout(10 * limits.cpu_seconds + _GRACE_S)
            if link is None:
                channel.send(message)
            else:
                with link:
                    socket.send_fds(channel, [message], [link.fileno()])
            if reply := channel.recv(1 << 16):
                return dict(json.loads(reply))
        except OSError:  # a timeout too
            pass
        self._stop_server()
        return None

    def _connect(self) -> socket.socket:
        """The channel to the server, which is started unless it runs."""
        if self._channel is not None and self._process is not None and self._process.poll() is None:
            return self._channel
        self._stop_server()
        trainer_end, server_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with server_end, shield_children():
            settings = {"channel": server_end.fileno(), "files": self._files, "landlock": self._landlock}
            settings["filter"] = build_filter().hex()
            loader = {k: v for k, v in os.environ.items() if k == "LD_LIBRARY_PATH"}  # some clusters' Python needs it
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-s", str(_SERVER), json.dumps(settings)],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, cwd="/", env=_ENVIRONMENT | loader,
                pass_fds=(server_end.fileno(), *self._files.values()),
                start_new_session=True,  # Ctrl-C in the terminal reaches the trainer alone
            )  # fmt: skip
        self._channel = trainer_end
        trainer_end.settimeout(_START_S)
        message = trainer_end.recv(1 << 16)
        status = json.loads(message) if message else {"problem": f"its server ended with {self._process.wait()}"}
        if status["problem"]:
            self._stop_server()
            raise _confinement_error(str(status["problem"]), status.get("unreadable") is True)
        return trainer_end

    def _stop_server(self) -> None:
        channel, self._channel = self._channel, None
        process, self._process = self._process, None
        if channel is not None:
            channel.close()
        if process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(2.0 if process.poll() is None else 0.0)
            process.kill()
            process.wait()


_running = 0  # programs, of all sandboxes of this process
_earlier_dumpable = 1
_running_lock = threading.Lock()


@contextlib.contextmanager
def _private_memory() -> Iterator[None]:
    """While programs run, keep other processes of the user from tracing this one or reading its memory or environment.

    Not for longer, since profilers, core dumps and some GPU libraries need that.
    """
    global _running, _earlier_dumpable
    libc = ctypes.CDLL(None)
    with _running_lock:
        if _running == 0:
            _earlier_dumpable = libc.prctl(_GET_DUMPABLE, 0, 0, 0, 0)
        _running += 1
        libc.prctl(_SET_DUMPABLE, 0, 0, 0, 0)
    try:
        yield
    finally:
        with _running_lock:
            _running -= 1
            if _running == 0 and _earlier_dumpable == 1:  # a process cannot set 2
                libc.prctl(_SET_DUMPABLE, 1, 0, 0, 0)


def _confinement_error(problem: str, unreadable: bool = False) -> UserError:
    needs = (
        "it needs Linux with seccomp on x86_64 or aarch64, and in a container a profile that lets a process add filters"
    )
    if unreadable:
        needs = (
            "root's runs execute programs as nobody: install Python where every user can read it, such as /opt, "
            "start the run as another user than root, or use a kernel with Landlock (Linux 5.13)"
        )
    return UserError(f"reward.verifier=python_tests: this machine cannot confine a program ({problem}); {needs}")


def _write(descriptor: int, data: bytes) -> None:
    offset = 0
    while offset < len(data):
        offset += os.pwrite(descriptor, data[offset:], offset)


def _read(descriptor: int, limit: int) -> bytes:
    content = bytearray()
    while len(content) < limit and (chunk := os.pread(descriptor, limit - len(content), len(content))):
        content += chunk
    return bytes(content)
