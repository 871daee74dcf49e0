"""The worker process: builds the engine, then serves one run until the run closes the connection or dies."""

from __future__ import annotations

import importlib
import json
import os
import socket
import sys
import threading
import time
import traceback
from array import array
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch

from .weights import RefitReceiver
from .wire import PROTOCOL, Channel, RefusedError, WireError

_HEARTBEAT_S = 5.0  # between two messages by which a generating worker shows that it is alive


def _build_engine(settings: dict[str, Any]) -> Any:
    """The WorkerEngine of the module that has the engine's name (generation.engine)."""
    return importlib.import_module(f"{__package__}.{settings['engine']}").WorkerEngine(settings)


class Server:
    """Answers the run's requests until it closes the connection."""

    def __init__(self, channel: Channel, engine: Any, weights: RefitReceiver) -> None:
        self.channel, self.engine, self.weights = channel, engine, weights
        self._last_heartbeat = time.monotonic()

    def run(self) -> None:
        """Answer requests; an error of the engine is sent as a refusal. Raises WireError when the run is gone."""
        while True:
            message, payload = self.channel.receive()
            try:
                self.channel.send(self._answer(message, payload))
            except RefusedError as error:
                self.channel.send({"refused": str(error)})
            except WireError:
                raise
            except Exception as error:
                traceback.print_exc()
                self.channel.send({"refused": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"})

    def _answer(self, message: dict[str, Any], payload: bytearray) -> dict[str, Any]:
        kind = message["op"]
        if kind == "generate":
            return self._generate(message, payload)
        if kind == "begin":
            self.weights.begin(message["version"])
        elif kind == "bucket":
            self._collective(self.engine.receive, message["slot"])
            self._all_or_nothing(self.weights.load_bucket, message["slot"], message["pieces"], payload)
        elif kind == "commit":
            self._all_or_nothing(self.weights.commit, message["version"], message["checksums"])
        elif kind == "join":
            self._collective(self.engine.join, bytes.fromhex(message["id"]), message["size"])
        elif kind == "abort":
            self.weights.abort()
        elif kind == "sleep":
            if self.engine.sleep():
                self.weights.version = None  # the engine has freed its weights
        elif kind == "wake":
            self.engine.wake()
        else:
            raise RefusedError(f"unknown request {kind!r}")
        return {"ok": kind, "version": self.weights.version}

    @staticmethod
    def _collective(call: Callable[..., None], *arguments: Any) -> None:
        """Make a call that is a collective with the run. If it fails, end this process: the run would wait."""
        try:
            call(*arguments)
        except BaseException:
            traceback.print_exc()
            os._exit(1)

    def _all_or_nothing(self, call: Callable[..., None], *arguments: Any) -> None:
        """Make a call that belongs to the refit, and abort the refit if it fails."""
        try:
            call(*arguments)
        except BaseException:
            self.weights.abort()
            raise

    def _generate(self, message: dict[str, Any], payload: bytearray) -> dict[str, Any]:
        version = self.weights.version
        if version is None:
            raise RefusedError("the engine has no weights: a full refit must be committed first")
        tokens = array("i", bytes(payload)).tolist()
        ends = list(accumulate(message["lengths"]))
        prompts = [tokens[end - length : end] for end, length in zip(ends, message["lengths"], strict=True)]

        def deliver(
            index: int, tokens: Sequence[int], log_probs: Sequence[float], reason: str, routes: Any = None
        ) -> None:
            header = {"response": index, "tokens": len(tokens), "reason": reason, "version": version}
            payload = array("i", tokens).tobytes() + array("f", log_probs).tobytes()
            if message["routes"] and routes is not None:  # an array [tokens, layers, K]
                header["routes"] = [*routes.shape, routes.itemsize]
                payload += routes.tobytes()
            self.channel.send(header, payload)

        self.engine.generate(prompts, message["seeds"], message["sampling"], deliver, self._heartbeat)
        return {"done": len(prompts), "version": version}

    def _heartbeat(self) -> None:
        """Tell the run every few seconds that the engine makes progress. Raises WireError if the run is gone."""
        if time.monotonic() - self._last_heartbeat > _HEARTBEAT_S:
            self._last_heartbeat = time.monotonic()
            self.channel.send({"alive": True})


def connect(address: str | list[Any]) -> socket.socket:
    """Connect to the run and return the connection. address: the path of a Unix socket, or [host, port]."""
    if isinstance(address, str):
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(address)
    else:
        connection = socket.create_connection((address[0], address[1]))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def _exit_with_run() -> None:
    """End this process when the run ends, however it ends: that closes this process's standard input."""
    while sys.stdin.buffer.read(1):
        pass
    os._exit(1)


def main() -> None:
    settings = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_exit_with_run, daemon=True).start()
    channel = Channel(connect(settings["address"]))
    channel.authenticate(bytes.fromhex(settings["secret"]), b"worker")
    start = time.monotonic()
    try:
        engine = _build_engine(settings)
        dtype = getattr(torch, settings["dtype"])
        weights = RefitReceiver(engine, settings["model"], dtype, settings["remote"], settings.get("bucket_bytes"))
    except Exception as error:
        traceback.print_exc()
        channel.send({"refused": f"{type(error).__name__}: {' '.join(str(error).split())[:1000]}"})
        raise SystemExit(1) from None
    build_seconds = time.monotonic() - start
    import_seconds = getattr(engine, "import_seconds", 0.0)
    channel.send(
        {
            "ready": True,
            "protocol": PROTOCOL,
            "torch": torch.__version__,
            "staging": weights.staging,
            "seconds": {"import": import_seconds, "build": build_seconds - import_seconds},
        }
    )
    try:
        Server(channel, engine, weights).run()
    except WireError:
        os._exit(0)  # the run has closed the connection or died; an engine's own threads would keep this process alive


if __name__ == "__main__":
    main()
