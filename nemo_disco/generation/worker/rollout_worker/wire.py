"""Messages over a socket and shared staging memory, for both sides of the wire (the run imports it from here too).

A message is a JSON object and raw bytes; nothing is unpickled.
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

PROTOCOL = 4
_MAGIC = b"NDRW"
_HELLO = struct.Struct(">4sH32s")  # magic, protocol, nonce
_HEAD = struct.Struct(">IQ")  # bytes of JSON, bytes of payload
_PIECE = 64 << 20  # bytes allocated at a time: memory grows with the bytes that arrive, not with the announced size
# Limits in bytes on a message's JSON and payload: a hundred times the needs of a step of a thousand responses.
LARGEST = (256 << 20, 4 << 30)


class WireError(ConnectionError):
    """The peer is gone, or is not a peer of this run."""


class RefusedError(Exception):
    """The worker refused a request; the message says why, in one line."""


class Channel:
    """Sends and receives messages over a stream socket."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection

    def authenticate(self, secret: bytes, role: bytes, seconds: float | None = None) -> None:
        """Prove to the peer, and check that it proves, knowledge of the secret (HMAC-SHA256 over both nonces).

        role: b"run" or b"worker". seconds: limit for the whole exchange, however slowly the peer sends.
        Raises WireError, TimeoutError.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        own_nonce = os.urandom(32)
        self.socket.sendall(_HELLO.pack(_MAGIC, PROTOCOL, own_nonce))
        magic, protocol, peer_nonce = _HELLO.unpack(self._read(_HELLO.size, deadline))
        if magic != _MAGIC:
            raise WireError("the peer does not speak the rollout protocol")
        if protocol != PROTOCOL:
            raise WireError(f"the peer speaks rollout protocol {protocol}, this side {PROTOCOL}")
        peer = b"worker" if role == b"run" else b"run"
        self.socket.sendall(hmac.digest(secret, role + own_nonce + peer_nonce, hashlib.sha256))
        if not hmac.compare_digest(
            self._read(32, deadline), hmac.digest(secret, peer + peer_nonce + own_nonce, hashlib.sha256)
        ):
            raise WireError("the peer does not know this run's secret")

    def send(self, message: dict[str, Any], payload: bytes | bytearray | memoryview = b"") -> None:
        body = json.dumps(message).encode()
        self.socket.sendall(_HEAD.pack(len(body), len(payload)) + body)
        if payload:
            self.socket.sendall(payload)

    def receive(self) -> tuple[dict[str, Any], bytearray]:
        """The next message. Raises TimeoutError, and WireError if it is malformed or announced larger than LARGEST."""
        body, payload = _HEAD.unpack(self._read(_HEAD.size))
        if body > LARGEST[0] or payload > LARGEST[1]:
            raise WireError(f"the peer announced a message of {body:,} and {payload:,} bytes, more than any has")
        try:
            message = json.loads(self._read(body))
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            raise WireError("the peer sent a message that is no JSON object")
        return message, self._read(payload)

    def _read(self, count: int, deadline: float | None = None) -> bytearray:
        """Read `count` bytes. deadline: the time.monotonic() by which all of them must have come."""
        data, filled = bytearray(min(count, _PIECE)), 0
        while filled < count:
            if filled == len(data):
                data.extend(bytes(min(count - filled, _PIECE)))
            if deadline is not None:
                self.socket.settimeout(max(deadline - time.monotonic(), 1e-3))
            with memoryview(data) as view, view[filled:] as rest:
                size = self.socket.recv_into(rest)
            if not size:
                raise WireError("the connection was closed")
            filled += size
        return data


def map_staging(path: str, shape: Sequence[int]) -> Tensor:
    """Shared memory of another process of this machine, as a tensor [slots, bytes] uint8. Raises RefusedError if it is
    smaller than the shape."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        if os.fstat(descriptor).st_size < product(shape):
            raise RefusedError(f"refit: the staging memory at {path} is smaller than {product(shape):,} bytes")
        shared = mmap.mmap(descriptor, product(shape), flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
    finally:
        os.close(descriptor)
    return torch.frombuffer(shared, dtype=torch.uint8).view(*shape)


def product(shape: Sequence[int]) -> int:
    """The number of elements of a shape."""
    count = 1
    for n in shape:
        count *= n
    return count
