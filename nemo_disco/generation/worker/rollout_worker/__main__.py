"""The worker's process: builds the engine, then serves one run until it closes the connection or dies."""

from __future__ import annotations

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

from .weights import Weights
from .wire import PROTOCOL, Channel, RefusedError, WireError

_PULSE_S = 5.0  # a generating engine says this often that it lives


def _engine(settings: dict[str, Any]) -> Any:
    if settings["engine"] == "vllm":
        from .vllm import Vllm

        return Vllm(settings)
    if settings["engine"] == "tensorrt_llm":
        from .tensorrt_llm import TensorRtLlm

        return TensorRtLlm(settings)
    raise RefusedError(f"no such engine: {settings['engine']}")


class Server:
    """Serves one run until it closes the connection."""

    def __init__(self, channel: Channel, engine: Any, weights: Weights) -> None:
        self.channel, self.engine, self.weights = channel, engine, weights
        self._pulse = time.monotonic()

    def run(self) -> None:
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
            self._all_or_nothing(self.weights.bucket, message["slot"], message["pieces"], payload)
        elif kind == "commit":
            self._all_or_nothing(self.weights.commit, message["version"], message["checksums"])
        elif kind == "join":
            self._collective(self.engine.join, bytes.fromhex(message["id"]), message["size"])
        elif kind == "abort":
            self.weights.abort()
        elif kind == "sleep":
            if self.engine.sleep():
                self.weights.version = None  # the weights were given back with the rest
        elif kind == "wake":
            self.engine.wake()
        else:
            raise RefusedError(f"unknown request {kind!r}")
        return {"ok": kind, "version": self.weights.version}

    @staticmethod
    def _collective(part: Callable[..., None], *arguments: Any) -> None:
        """What the run is in as well: before any refusal, and if it fails only our end takes the run out of it."""
        try:
            part(*arguments)
        except BaseException:
            traceback.print_exc()
            os._exit(1)

    def _all_or_nothing(self, part: Callable[..., None], *arguments: Any) -> None:
        try:
            part(*arguments)
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

        def deliver(index: int, tokens: Sequence[int], log_probs: Sequence[float], reason: str) -> None:
            found = {"response": index, "tokens": len(tokens), "reason": reason, "version": version}
            self.channel.send(found, array("i", tokens).tobytes() + array("f", log_probs).tobytes())

        self.engine.generate(prompts, message["seeds"], message["sampling"], deliver, self._live)
        return {"done": len(prompts), "version": version}

    def _live(self) -> None:
        """Between an engine's steps: tell the run that there is progress, and notice that it is gone."""
        if time.monotonic() - self._pulse > _PULSE_S:
            self._pulse = time.monotonic()
            self.channel.send({"alive": True})


def connect(address: str | list[Any]) -> socket.socket:
    """To the run: the path of a Unix socket, or [host, port]."""
    if isinstance(address, str):
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(address)
    else:
        connection = socket.create_connection((address[0], address[1]))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def _end_with_the_run() -> None:
    """The run holds our standard input open: when it dies, however it dies, so do we."""
    while sys.stdin.buffer.read(1):
        pass
    os._exit(1)


def main() -> None:
    settings = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_the_run, daemon=True).start()
    channel = Channel(connect(settings["address"]))
    channel.authenticate(bytes.fromhex(settings["secret"]), b"worker")
    began = time.monotonic()
    try:
        engine = _engine(settings)
        dtype = getattr(torch, settings["dtype"])
        weights = Weights(engine, settings["model"], dtype, settings["remote"], settings.get("bucket_bytes"))
    except Exception as error:
        traceback.print_exc()
        channel.send({"refused": f"{type(error).__name__}: {' '.join(str(error).split())[:1000]}"})
        raise SystemExit(1) from None
    took = time.monotonic() - began
    imported = getattr(engine, "import_seconds", 0.0)
    channel.send(
        {
            "ready": True,
            "protocol": PROTOCOL,
            "torch": torch.__version__,
            "staging": weights.staging,
            "seconds": {"import": imported, "build": took - imported},
        }
    )
    try:
        Server(channel, engine, weights).run()
    except WireError:
        os._exit(0)  # the run is gone, or closed us; engines' own threads do not hold this process up


if __name__ == "__main__":
    main()
