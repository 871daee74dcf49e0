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
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

PROTOCOL = 3
_MAGIC = b"NDRW"
_HELLO = struct.Struct(">4sH32s")  # magic, protocol, nonce
_HEAD = struct.Struct(">IQ")  # bytes of JSON, bytes of payload


class WireError(ConnectionError):
    """The peer is gone, or is not what it should be."""


class RefusedError(Exception):
    """A request that the worker will not serve; the message says why, in one line."""


class Channel:
    """Messages over a stream socket: a JSON object and raw bytes each. Nothing is unpickled."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection

    def authenticate(self, secret: bytes, role: bytes) -> None:
        """Both sides prove that they know the secret (HMAC-SHA256 over both nonces). role: b"run" or b"worker"."""
        mine = os.urandom(32)
        self.socket.sendall(_HELLO.pack(_MAGIC, PROTOCOL, mine))
        magic, protocol, theirs = _HELLO.unpack(self._exactly(_HELLO.size))
        if magic != _MAGIC:
            raise WireError("the peer does not speak the rollout protocol")
        if protocol != PROTOCOL:
            raise WireError(f"the peer speaks rollout protocol {protocol}, this side {PROTOCOL}")
        peer = b"worker" if role == b"run" else b"run"
        self.socket.sendall(hmac.digest(secret, role + mine + theirs, hashlib.sha256))
        if not hmac.compare_digest(self._exactly(32), hmac.digest(secret, peer + theirs + mine, hashlib.sha256)):
            raise WireError("the peer does not know this run's secret")

    def send(self, message: dict[str, Any], payload: bytes | bytearray | memoryview = b"") -> None:
        body = json.dumps(message).encode()
        self.socket.sendall(_HEAD.pack(len(body), len(payload)) + body)
        if payload:
            self.socket.sendall(payload)

    def receive(self) -> tuple[dict[str, Any], bytearray]:
        body, payload = _HEAD.unpack(self._exactly(_HEAD.size))
        message: dict[str, Any] = json.loads(self._exactly(body))
        return message, self._exactly(payload)

    def _exactly(self, count: int) -> bytearray:
        data = bytearray(count)
        view = memoryview(data)
        while view:
            got = self.socket.recv_into(view)
            if not got:
                raise WireError("the connection was closed")
            view = view[got:]
        return data


def map_staging(path: str, shape: Sequence[int]) -> Tensor:
    """The slots [slots, bytes] of shared memory that another process of this machine made."""
    descriptor = os.open(path, os.O_RDWR)
    try:
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
