"""Stand-ins without a GPU for IpcMemory and Broadcast, for the trainer and the worker: shared memory and Unix sockets.

A broadcast blocks like NCCL's: no rank returns before all have entered, and if a rank has ended the others wait until
they are aborted.
"""

from __future__ import annotations

import os
import socket
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_disco.generation.worker.rollout_worker.wire import map_staging


@dataclass(frozen=True)
class SharedMemory:
    """Stands in for IpcMemory; `closed` counts the calls of `close`."""

    tensor: Tensor
    path: str
    closed = [0]  # noqa: RUF012 - one count for all objects

    @classmethod
    def allocate(cls, size: int, _device: int) -> SharedMemory:
        descriptor = os.memfd_create("stand-in")
        os.ftruncate(descriptor, size)
        path = f"/proc/{os.getpid()}/fd/{descriptor}"
        return cls(map_staging(path, (size,)), path)

    @classmethod
    def open(cls, description: dict[str, Any]) -> SharedMemory:
        return cls(map_staging(description["path"], (description["size"],)), description["path"])

    def close(self) -> None:
        self.closed[0] += 1

    def describe(self) -> dict[str, Any]:
        return {"path": self.path, "size": self.tensor.numel()}


class SocketBroadcast:
    """Stands in for Broadcast. unique_id: the path of the socket on which rank 0 listens."""

    def __init__(self, unique_id: bytes, rank: int, size: int, _device: torch.device) -> None:
        path = unique_id.rstrip(b"\0").decode()
        self.rank, self.aborted = rank, threading.Event()
        if rank == 0:
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(path)
                listener.listen()
                self.peers = [listener.accept()[0] for _ in range(size - 1)]
        else:
            self.peers = [_connect(path)]
        self._meet()

    @staticmethod
    def make_id() -> bytes:
        """A new path for the socket, padded to the 128 bytes of an NCCL id."""
        return str(Path(tempfile.mkdtemp(prefix="nccl-")) / "s").encode().ljust(128, b"\0")

    def __call__(self, memory: Tensor) -> None:
        """Send the memory from rank 0, or receive into it on the other ranks."""
        self._meet()
        view = memoryview(memory.numpy())
        if self.rank == 0:
            for peer in self.peers:
                self._call(peer.sendall, view)
        else:
            self._receive(self.peers[0], view)

    def abort(self) -> None:
        self.aborted.set()

    def _meet(self) -> None:
        """Wait until all ranks have called this."""
        for peer in self.peers:
            self._call(peer.sendall, b"h")
        for peer in self.peers:
            self._receive(peer, memoryview(bytearray(1)))

    def _receive(self, peer: socket.socket, view: memoryview) -> None:
        while view:
            count = self._call(peer.recv_into, view)
            view = view[count:] if count else self._wait_for_abort()

    def _call(self, operation: Any, *arguments: Any) -> Any:
        """operation(*arguments) on a socket. If the peer has ended: wait for `abort`, then raise RuntimeError."""
        try:
            return operation(*arguments)
        except OSError:
            return self._wait_for_abort()

    def _wait_for_abort(self) -> Any:
        self.aborted.wait()
        raise RuntimeError("aborted")


def _connect(path: str) -> socket.socket:
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(path)
            return connection
        except OSError:
            time.sleep(0.01)
