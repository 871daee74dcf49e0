"""What both sides of the wire share: messages over a socket, and shared staging memory.

The run imports it from here too: one definition. A message is a JSON object and raw bytes; nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import mmap
import os
import socket
import struct
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

PROTOCOL = 3
_MAGIC = b"NDRW"
_HELLO = struct.Struct(">4sH32s")  # magic, protocol, nonce
_HEAD = struct.Struct(">IQ")  # bytes of JSON, bytes of payload
_PIECE = 64 << 20  # bytes that are made room for at a time: memory follows what arrives, not what is announced
# Bytes of JSON and of a payload: a hundred times what a step of a thousand responses needs.
LARGEST = (256 << 20, 4 << 30)


class WireError(ConnectionError):
    """The peer is gone, or is not what it should be."""


class RefusedError(Exception):
    """A request that the worker will not serve; the message says why, in one line."""


class Channel:
    """Messages over a stream socket: a JSON object and raw bytes each. Nothing is unpickled."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection

    def authenticate(self, secret: bytes, role: bytes, seconds: float | None = None) -> None:
        """Both sides prove that they know the secret (HMAC-SHA256 over both nonces). role: b"run" or b"worker".

        seconds: for all of it, however slowly the peer sends. Raises WireError, TimeoutError.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        mine = os.urandom(32)
        self.socket.sendall(_HELLO.pack(_MAGIC, PROTOCOL, mine))
        magic, protocol, theirs = _HELLO.unpack(self._exactly(_HELLO.size, deadline))
        if magic != _MAGIC:
            raise WireError("the peer does not speak the rollout protocol")
        if protocol != PROTOCOL:
            raise WireError(f"the peer speaks rollout protocol {protocol}, this side {PROTOCOL}")
        peer = b"worker" if role == b"run" else b"run"
        self.socket.sendall(hmac.digest(secret, role + mine + theirs, hashlib.sha256))
        if not hmac.compare_digest(
            self._exactly(32, deadline), hmac.digest(secret, peer + theirs + mine, hashlib.sha256)
        ):
            raise WireError("the peer does not know this run's secret")

    def send(self, message: dict[str, Any], payload: bytes | bytearray | memoryview = b"") -> None:
        body = json.dumps(message).encode()
        self.socket.sendall(_HEAD.pack(len(body), len(payload)) + body)
        if payload:
            self.socket.sendall(payload)

    def receive(self) -> tuple[dict[str, Any], bytearray]:
        """The next message. Raises WireError for what is none, or is announced to be larger than any; TimeoutError."""
        body, payload = _HEAD.unpack(self._exactly(_HEAD.size))
        if body > LARGEST[0] or payload > LARGEST[1]:
            raise WireError(f"the peer announced a message of {body:,} and {payload:,} bytes, which none has")
        try:
            message = json.loads(self._exactly(body))
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            raise WireError("the peer sent a message that is no JSON object")
        return message, self._exactly(payload)

    def _exactly(self, count: int, deadline: float | None = None) -> bytearray:
        """The next `count` bytes. deadline: of time.monotonic(), for all of them."""
        data, filled = bytearray(min(count, _PIECE)), 0
        while filled < count:
            if filled == len(data):
                data.extend(bytes(min(count - filled, _PIECE)))
            if deadline is not None:
                self.socket.settimeout(max(deadline - time.monotonic(), 1e-3))
            with memoryview(data) as view, view[filled:] as rest:
                got = self.socket.recv_into(rest)
            if not got:
                raise WireError("the connection was closed")
            filled += got
        return data


def map_staging(path: str, shape: Sequence[int]) -> Tensor:
    """The slots [slots, bytes] of shared memory that another process of this machine made. Raises RefusedError if it
    made less than that."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        if os.fstat(descriptor).st_size < product(shape):
            raise RefusedError(f"refit: the staging memory at {path} is smaller than {product(shape):,} bytes")
        shared = mmap.mmap(descriptor, product(shape), flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
    finally:
        os.close(descriptor)
    return torch.frombuffer(shared, dtype=torch.uint8).view(*shape)


def product(shape: Sequence[int]) -> int:
    """Elements of a shape."""
    count = 1
    for n in shape:
        count *= n
    return count
