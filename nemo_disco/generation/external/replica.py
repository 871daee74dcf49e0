"""One replica of an engine: its process started, watched and ended, and the messages to it.

Knows the wire; not what is generated or trained. A replica that dies, hangs or loses its connection raises
ReplicaLostError with what its log said last.
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
from nemo_disco.runtime.signals import STOP_SIGNALS, shield_children

STARTUP_S = 1800.0  # large models compile and capture graphs
SILENCE_S = 600.0  # a worker at work speaks every few seconds
_CLOSE_S = 5.0
_POLL_S = 0.1
_GREETING_S = 10.0  # until a connection has shown that it knows the secret
_WORKER_PATH = Path(__file__).parent.parent / "worker"
# What a launcher tells its ranks would make the engine join the training's process group; our packages are not its own.
_NOT_ITS_OWN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PYTHONPATH")
_OF_THE_JOB = ("SLURM_JOB_ID", "SLURM_CONF")
_SPARED = " ".join(number.name.removeprefix("SIG") for number in STOP_SIGNALS)
# On a CPU each refit repacks the weights: memory given back to the kernel would come again page by page.
_MALLOC = "glibc.malloc.trim_threshold=0x7fffffffffff:glibc.malloc.mmap_threshold=0x7fffffffffff"
log = logging.getLogger(__name__)
T = TypeVar("T")


class ReplicaLostError(Exception):
    """The replica's process ended, hangs, or cannot be reached; the message says how it ended and what it said last."""


@dataclass(frozen=True)
class Place:
    """Where a replica runs: by which Python, on which GPUs of which host (None: this machine), its log."""

    python: str
    log: Path
    gpus: Sequence[str] = ()  # as CUDA_VISIBLE_DEVICES names them there
    host: str | None = None


class Replica:
    """A worker process and the connection to it. `start`, then `wait_ready`; `end` it in any case."""

    def __init__(self, name: str, place: Place, settings: Mapping[str, Any]) -> None:
        """settings: what the worker's engine is built with, as JSON."""
        self.name, self.place, self.settings = name, place, dict(settings)
        self.ready: dict[str, Any] = {}  # what the worker said of itself
        self.staging: Any = None  # the refit's, of the present process
        self.version: int | None = None  # of the weights that it has
        self.start_seconds: dict[str, float] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: Channel | None = None
        self._listener: socket.socket | None = None
        self._scratch: Scratch | None = None  # where its socket is, until it is connected
        self._began = 0.0

    # --- life ---

    def start(self) -> None:
        """Start the process; it connects back."""
        self.end()
        self._began = time.monotonic()
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
                start_new_session=True,  # Ctrl-C reaches the run alone, and all that the engine starts ends together
            )
        atexit.register(self.end)
        # By standard input, not by arguments: those are for everyone to see.
        remote = self.place.host is not None
        settings = self.settings | {"address": address, "secret": self._secret.hex(), "remote": remote}
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it ended already: wait_ready says how
            self._process.stdin.write(json.dumps(settings).encode() + b"\n")
            self._process.stdin.flush()

    def wait_ready(self) -> None:
        """Until the engine is built. Raises ReplicaLostError, or RefusedError with what the engine said."""
        assert self._listener is not None
        deadline = time.monotonic() + STARTUP_S
        self._listener.settimeout(0.2)
        while (connection := self._accept()) is None:
            self._check_alive()
            if time.monotonic() > deadline:
                raise self._lost(f"did not connect in {STARTUP_S:.0f} s")
        self._stop_listening()
        connection.settimeout(SILENCE_S)
        self._channel = Channel(connection)
        self.start_seconds = {"connected": time.monotonic() - self._began}
        self.ready, _ = self.receive(STARTUP_S)
        self.start_seconds |= self.ready["seconds"] | {"total": time.monotonic() - self._began}
        self.version = None

    def end(self) -> None:
        """End the process and all that it started. Tidily if it can; may be called at any time."""
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
            self._connected().send(dict(message), payload)
        except OSError as error:
            raise self._lost(str(error)) from None

    def receive(self, silence: float = SILENCE_S) -> tuple[dict[str, Any], bytearray]:
        """The next message. Raises RefusedError if it is a refusal, ReplicaLostError after `silence` seconds."""
        channel = self._connected()
        channel.socket.settimeout(silence)
        try:
            message, payload = channel.receive()
        except TimeoutError:
            raise self._lost(f"said nothing for {silence:.0f} s") from None
        except (WireError, OSError) as error:
            raise self._lost(str(error)) from None
        if "refused" in message:
            raise RefusedError(message["refused"])
        return message, payload

    def ask(self, **message: Any) -> dict[str, Any]:
        """Send a request and return its answer."""
        self.send(message)
        return self.receive()[0]

    def together(self, part: Callable[[], T]) -> T:
        """Do what returns only when the replica does its share: a collective. Raises ReplicaLostError when the replica
        ends or does not come, where NCCL itself may wait for ever (NVIDIA/nccl issue 585), or when `part` fails."""
        assert self._process is not None
        done: Future[T] = Future()

        def run() -> None:
            try:
                done.set_result(part())
            except BaseException as problem:
                done.set_exception(problem)

        threading.Thread(target=run, name="collective", daemon=True).start()
        closed, deadline = select.poll(), time.monotonic() + SILENCE_S
        closed.register(self.fileno(), select.POLLRDHUP)
        while not wait([done], _POLL_S).done:
            if closed.poll(0) or self._process.poll() is not None:
                raise self._lost("ended in a collective")
            if time.monotonic() > deadline:
                raise self._lost(f"did not come to a collective in {SILENCE_S:.0f} s")
        try:
            return done.result()
        except RuntimeError as problem:  # what NCCL makes of a lost connection
            raise self._lost(f"was lost in a collective: {problem}") from problem

    def fileno(self) -> int:
        """For a selector: readable when there is a message."""
        return self._connected().socket.fileno()

    def _connected(self) -> Channel:
        if self._channel is None:
            raise self._lost("is not running")
        return self._channel

    # --- parts ---

    def _listen(self) -> str | list[Any]:
        """Where the worker is to connect: a Unix socket that this user alone can reach, or a port."""
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
        """A connection that proved to be the worker's, if there was one; strangers reach a port too."""
        assert self._listener is not None
        with contextlib.suppress(TimeoutError):
            connection, _ = self._listener.accept()
            connection.settimeout(_GREETING_S)
            try:
                Channel(connection).authenticate(self._secret, b"run", _GREETING_S)
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
        own = [self.place.python, "-m", "rollout_worker"]
        if self.place.host is None:
            return own
        there = shlex.join(["env", *(f"{k}={v}" for k, v in self._own_environment().items()), *own])
        if "SLURM_JOB_ID" in os.environ:
            there = f"trap '' {_SPARED}; exec {there}"  # which srun passes on: the engine outlives a request to stop
            return ["srun", "--overlap", "--nodes=1", "--ntasks=1", f"--nodelist={self.place.host}", "sh", "-c", there]
        return ["ssh", "-o", "BatchMode=yes", self.place.host, there]

    def _environment(self) -> dict[str, str]:
        mine = {name: value for name, value in os.environ.items() if name not in _NOT_ITS_OWN}
        if mine.get(launch.ALLOCATOR_VARIABLES[0]) == launch.GROWING_SEGMENTS:
            del mine[launch.ALLOCATOR_VARIABLES[0]]  # the run's: an engine that sleeps has an allocator of its own
        if self.place.host is None:
            return mine | self._own_environment()
        # srun reads its options there: those of the training step, tasks and binding of CPUs and GPUs, are not its own.
        return {name: value for name, value in mine.items() if not name.startswith("SLURM_") or name in _OF_THE_JOB}

    def _own_environment(self) -> dict[str, str]:
        gpus = {"CUDA_VISIBLE_DEVICES": ",".join(self.place.gpus)} if self.place.gpus else {}
        return {"PYTHONPATH": str(_WORKER_PATH), "GLIBC_TUNABLES": _MALLOC, **gpus}

    def _check_alive(self) -> None:
        assert self._process is not None
        if self._process.poll() is not None:
            raise self._lost("ended")

    def _lost(self, how: str) -> ReplicaLostError:
        """The error, after ending what is left of the process."""
        process = self._process
        if process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1.0)  # its connection closes a moment before it ends
            code = process.poll()
            if code is not None and code < 0:
                how = f"was killed by {signal.Signals(-code).name}"
            elif code is not None:
                how = f"ended with exit code {code}"
        self.end()
        return ReplicaLostError(f"{self.name} {how}{_last_words(self.place.log)}; its log: {self.place.log}")


def _end(process: subprocess.Popen[bytes], remote: bool) -> None:
    assert process.stdin is not None
    with contextlib.suppress(OSError):
        process.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_CLOSE_S)
    if remote and process.poll() is None:
        process.terminate()  # srun then kills its step; killed itself it would leave a hanging engine where it is
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_CLOSE_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_words(log: Path) -> str:
    """The last line of a log that is an error's."""
    try:
        lines = log.read_bytes()[-20_000:].decode(errors="replace").splitlines()
    except OSError:
        return ""
    said = [line.strip() for line in lines if "Error" in line or "error:" in line]
    return f" (it said: {said[-1][:300]})" if said else ""
