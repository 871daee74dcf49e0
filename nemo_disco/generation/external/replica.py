"""One replica of an engine: starts, watches and ends its process, and exchanges messages with it.

Knows the wire, but nothing of sampling or training. A replica that dies, hangs or loses its connection raises
ReplicaLostError with the last error in its log.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import secrets
import select
import shlex
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from nemo_disco.generation.worker.rollout_worker.wire import Channel, RefusedError, WireError
from nemo_disco.runtime import launch, srun
from nemo_disco.runtime.files import Scratch, open_regular, writing
from nemo_disco.runtime.stop_signals import STOP_SIGNALS, shield_children

STARTUP_S = 1800.0  # large models compile and capture graphs
SILENCE_S = 600.0  # without a message, of which a busy worker sends one every few seconds
_CLOSE_S = 5.0
_POLL_S = 0.1
_AUTHENTICATION_S = 10.0
_WORKER_PATH = Path(__file__).parent.parent / "worker"
# Not for an engine: a launcher's variables would make it join the training's process group; it has its own packages.
_REMOVED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PYTHONPATH")
_SRUN_VARIABLES = ("SLURM_JOB_ID", "SLURM_CONF")
_STOP_SIGNALS = " ".join(number.name.removeprefix("SIG") for number in STOP_SIGNALS)
# On a CPU each refit repacks the weights: memory that malloc returned to the kernel would be faulted in page by page.
_MALLOC = "glibc.malloc.trim_threshold=0x7fffffffffff:glibc.malloc.mmap_threshold=0x7fffffffffff"
log = logging.getLogger(__name__)
T = TypeVar("T")


class ReplicaLostError(Exception):
    """The replica's process ended, hangs or cannot be reached. The message quotes its last logged error."""


@dataclass(frozen=True)
class Place:
    """The place of a replica: the engine's Python, its log file, its GPUs, and its host (None is this host)."""

    python: str
    log: Path
    gpus: Sequence[str] = ()  # as CUDA_VISIBLE_DEVICES names them on that host
    host: str | None = None


class Replica:
    """A worker process and the connection to it. Call `start`, then `wait_ready`, and `end` in any case."""

    def __init__(self, name: str, place: Place, settings: Mapping[str, Any]) -> None:
        """settings: for the worker's engine, in JSON's types."""
        self.name, self.place, self.settings = name, place, dict(settings)
        self.ready: dict[str, Any] = {}  # the worker's message when its engine was built
        self.staging: Any = None  # Staging of the present process
        self.version: int | None = None  # of its weights; None without weights
        self.start_seconds: dict[str, float] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: Channel | None = None
        self._listener: socket.socket | None = None
        self._scratch: Scratch | None = None  # directory of the socket, until the worker has connected
        self._start_time = 0.0

    # --- life ---

    def start(self) -> None:
        """Start the process, which then connects to this process; `wait_ready` accepts the connection."""
        self.end()
        self._start_time = time.monotonic()
        self._secret = secrets.token_bytes(32)
        address = self._listen()
        with writing(self.place.log):
            self.place.log.parent.mkdir(parents=True, exist_ok=True)
        descriptor = open_regular(self.place.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        with open(descriptor, "ab") as log, shield_children():
            self._process = subprocess.Popen(
                self._command(),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment(),
                start_new_session=True,  # Ctrl-C reaches only the run; the engine's own processes end with its group
            )
        atexit.register(self.end)
        # By standard input: every user can read a process's arguments.
        remote = self.place.host is not None
        settings = self.settings | {"address": address, "secret": self._secret.hex(), "remote": remote}
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # the process ended already: wait_ready reports it
            self._process.stdin.write(json.dumps(settings).encode() + b"\n")
            self._process.stdin.flush()

    def wait_ready(self) -> None:
        """Wait until the engine is built. Raises ReplicaLostError, or RefusedError with the engine's own message."""
        assert self._listener is not None
        deadline = time.monotonic() + STARTUP_S
        self._listener.settimeout(0.2)
        while (connection := self._accept()) is None:
            self._check_alive()
            if time.monotonic() > deadline:
                raise self._lost_error(f"did not connect in {STARTUP_S:.0f} s")
        self._stop_listening()
        connection.settimeout(SILENCE_S)
        self._channel = Channel(connection)
        self.start_seconds = {"connected": time.monotonic() - self._start_time}
        self.ready, _ = self.receive(STARTUP_S)
        self.start_seconds |= self.ready["seconds"] | {"total": time.monotonic() - self._start_time}
        self.version = None

    def end(self) -> None:
        """End the process and all that it started, by force if it does not end itself. May be called at any time."""
        atexit.unregister(self.end)
        self.version = None
        self._stop_listening()
        channel, self._channel = self._channel, None
        if channel is not None:
            with contextlib.suppress(OSError):
                channel.socket.shutdown(socket.SHUT_RDWR)  # wakes a thread that waits for a message
        process, self._process = self._process, None
        if process is not None:
            _end(process, self.place.host is not None)
        if channel is not None:
            channel.socket.close()
        staging, self.staging = self.staging, None
        if staging is not None:
            staging.close()

    # --- messages ---

    def send(self, message: Mapping[str, Any], payload: bytes | bytearray | memoryview = b"") -> None:
        try:
            self._require_channel().send(dict(message), payload)
        except OSError as error:
            raise self._lost_error(str(error)) from None

    def receive(self, silence: float = SILENCE_S) -> tuple[dict[str, Any], bytearray]:
        """The next message. Raises RefusedError for a refusal, ReplicaLostError if none comes in `silence` seconds."""
        channel = self._require_channel()
        channel.socket.settimeout(silence)
        try:
            message, payload = channel.receive()
        except TimeoutError:
            raise self._lost_error(f"sent no message for {silence:.0f} s") from None
        except (WireError, OSError) as error:
            raise self._lost_error(str(error)) from None
        if "refused" in message:
            raise RefusedError(message["refused"])
        return message, payload

    def call(self, **message: Any) -> dict[str, Any]:
        """Send a request and return its answer."""
        self.send(message)
        return self.receive()[0]

    def run_collective(self, call: Callable[[], T]) -> T:
        """Run `call`, in which this process and the replica take part in a collective, and return its result. Raises
        ReplicaLostError if it fails or the replica is gone, where NCCL may wait for ever (NVIDIA/nccl issue 585)."""
        assert self._process is not None
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=run, name="collective", daemon=True).start()
        poll, deadline = select.poll(), time.monotonic() + SILENCE_S
        poll.register(self.fileno(), select.POLLRDHUP)
        while not wait([future], _POLL_S).done:
            if poll.poll(0) or self._process.poll() is not None:
                raise self._lost_error("ended in a collective")
            if time.monotonic() > deadline:
                raise self._lost_error(f"did not come to a collective in {SILENCE_S:.0f} s")
        try:
            return future.result()
        except RuntimeError as error:  # NCCL's, for a lost connection
            raise self._lost_error(f"was lost in a collective: {error}") from error

    def fileno(self) -> int:
        """The connection's file descriptor, for a selector: readable when there is a message."""
        return self._require_channel().socket.fileno()

    def _require_channel(self) -> Channel:
        if self._channel is None:
            raise self._lost_error("is not running")
        return self._channel

    # --- helpers ---

    def _listen(self) -> str | list[Any]:
        """Listen, and return the address for the worker: a Unix socket for this user alone, or host and port."""
        if self.place.host is None:
            self._scratch = Scratch()
            path = str(self._scratch.path / "socket")
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(path)
            self._listener.listen(1)
            return path
        self._listener = socket.create_server(("", 0))
        return [srun.node_address(), self._listener.getsockname()[1]]

    def _accept(self) -> socket.socket | None:
        """The connection of a worker that knows the secret (anyone can connect to a port); None if none came."""
        assert self._listener is not None
        with contextlib.suppress(TimeoutError):
            connection, _ = self._listener.accept()
            connection.settimeout(_AUTHENTICATION_S)
            try:
                Channel(connection).authenticate(self._secret, b"run", _AUTHENTICATION_S)
            except OSError as error:
                connection.close()
                log.warning("%s: a connection was refused: %s", self.name, error)
                return None
            return connection
        return None

    def _stop_listening(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        if self._scratch is not None:
            self._scratch.close()
            self._scratch = None

    def _command(self) -> list[str]:
        worker = [self.place.python, "-m", "rollout_worker"]
        if self.place.host is None:
            return worker
        script = shlex.join(["env", *(f"{k}={v}" for k, v in self._engine_variables().items()), *worker])
        if "SLURM_JOB_ID" in os.environ:
            script = f"trap '' {_STOP_SIGNALS}; exec {script}"  # srun passes them on; the engine outlives such a signal
            return ["srun", "--overlap", "--nodes=1", "--ntasks=1", f"--nodelist={self.place.host}", "sh", "-c", script]
        return ["ssh", "-o", "BatchMode=yes", self.place.host, script]

    def _environment(self) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if name not in _REMOVED}
        if inherited.get(launch.ALLOCATOR_VARIABLES[0]) == launch.GROWING_SEGMENTS:
            del inherited[launch.ALLOCATOR_VARIABLES[0]]  # the run set it; an engine that sleeps has its own allocator
        if self.place.host is None:
            return inherited | self._engine_variables()
        # srun reads options from SLURM_ variables: the training step's tasks and binding are not for the engine's step.
        return {k: v for k, v in inherited.items() if not k.startswith("SLURM_") or k in _SRUN_VARIABLES}

    def _engine_variables(self) -> dict[str, str]:
        gpus = {"CUDA_VISIBLE_DEVICES": ",".join(self.place.gpus)} if self.place.gpus else {}
        return {"PYTHONPATH": str(_WORKER_PATH), "GLIBC_TUNABLES": _MALLOC, **gpus}

    def _check_alive(self) -> None:
        assert self._process is not None
        if self._process.poll() is not None:
            raise self._lost_error("ended")

    def _lost_error(self, event: str) -> ReplicaLostError:
        """End the rest of the process and return the error to raise. An exit code or signal replaces `event` in it."""
        process = self._process
        if process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1.0)  # a process's connection closes a moment before it ends
            code = process.poll()
            if code is not None and code < 0:
                event = f"was killed by {signal.Signals(-code).name}"
            elif code is not None:
                event = f"ended with exit code {code}"
        self.end()
        return ReplicaLostError(f"{self.name} {event}{_last_error(self.place.log)}; its log: {self.place.log}")


def _end(process: subprocess.Popen[bytes], remote: bool) -> None:
    assert process.stdin is not None
    with contextlib.suppress(OSError):
        process.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_CLOSE_S)
    if remote and process.poll() is None:
        process.terminate()  # srun then kills its step; a killed srun would leave a hanging engine running
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_CLOSE_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_error(log: Path) -> str:
    """The last line of a log that reports an error, in parentheses; "" if there is none."""
    try:
        lines = log.read_bytes()[-20_000:].decode(errors="replace").splitlines()
    except OSError:
        return ""
    errors = [line.strip() for line in lines if "Error" in line or "error:" in line]
    return f" (last error: {errors[-1][:300]})" if errors else ""
