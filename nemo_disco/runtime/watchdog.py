"""Detects dead ranks and nodes by heartbeats: rank 0 watches all other ranks, and they watch rank 0.

A connection to a node without power breaks only after minutes or hours; the watchdog needs SILENCE_S. Uses two daemon
threads and a key-value store; must not import torch.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Sequence
from typing import Protocol

from nemo_disco.runtime import launch, srun

BEAT_S = 2.0
# Longer than anything that holds Python's lock, such as loading a library from a cold file system.
SILENCE_S = 30.0
FAREWELL_S = 5.0
CLEAN_UP_S = 20.0
_DONE = "done"


class Store(Protocol):
    """The methods of torch.distributed's stores that the watchdog uses."""

    def set(self, key: str, value: str, /) -> None: ...
    def multi_get(self, keys: list[str], /) -> Sequence[bytes]: ...
    def set_timeout(self, timeout: datetime.timedelta, /) -> None: ...
    def clone(self) -> Store: ...


class Watchdog:
    """Ends this process when a rank that it watches is silent for SILENCE_S.

    Call `start` on every rank, and `stop` before the process group is destroyed.
    """

    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        self._store, self._rank = store, rank
        self._watched = [r for r in range(world_size) if r != rank] if rank == 0 else [0]
        self._beats: dict[int, bytes] = {}
        self._nodes: dict[int, str] = {}
        self._stopped = threading.Event()
        self._beat_thread = threading.Thread(target=self._beat, name="watchdog-beat", daemon=True)

    def start(self) -> None:
        """Wait until the watched ranks have started too, then start the threads."""
        self._store.set(f"node/{self._rank}", srun.node_name())
        self._store.set(f"beat/{self._rank}", "0")
        names = self._store.multi_get([f"node/{rank}" for rank in self._watched])
        self._nodes = {rank: name.decode() for rank, name in zip(self._watched, names, strict=True)}
        # A second connection, with a short timeout: a blocking call on the first would block the beats.
        self._connection = self._store.clone()
        self._connection.set_timeout(datetime.timedelta(seconds=4 * BEAT_S))
        self._beat_thread.start()
        threading.Thread(target=self._count_silence, name="watchdog-silence", daemon=True).start()

    def stop(self) -> None:
        """Tell the other ranks that this rank ends on purpose. Rank 0, which has the store, leaves last."""
        self._stopped.set()
        self._beat_thread.join(FAREWELL_S)

    def _beat(self) -> None:
        beat = 0
        keys = [f"beat/{rank}" for rank in self._watched]
        while not self._stopped.wait(BEAT_S):
            beat += 1
            try:
                self._connection.set(f"beat/{self._rank}", str(beat))
                self._beats = dict(zip(self._watched, self._connection.multi_get(keys), strict=True))
            except RuntimeError:
                # Rank 0 is dead or slow. A new connection, since a late reply would be read as that to the next call.
                with contextlib.suppress(RuntimeError):
                    self._connection = self._connection.clone()
        with contextlib.suppress(RuntimeError):
            self._connection.set(f"beat/{self._rank}", _DONE)
            deadline = time.monotonic() + FAREWELL_S
            while self._rank == 0 and time.monotonic() < deadline:
                if all(value == _DONE.encode() for value in self._connection.multi_get(keys)):
                    break
                time.sleep(0.02)

    def _count_silence(self) -> None:
        """Count checks without a new beat, not seconds, so that a job that was suspended as a whole goes on."""
        previous, silent = self._beats, dict.fromkeys(self._watched, 0)
        while not self._stopped.wait(BEAT_S):
            beats = self._beats
            for rank in self._watched:
                alive = beats.get(rank) != previous.get(rank) or beats.get(rank) == _DONE.encode()
                silent[rank] = 0 if alive else silent[rank] + 1
                if silent[rank] * BEAT_S >= SILENCE_S:
                    self._end_process(rank)
            previous = beats

    def _end_process(self, rank: int) -> None:
        name = f"rank {rank} on {self._nodes[rank]}"
        error = TimeoutError(f"{name} has been silent for {SILENCE_S:.0f} s: its process or its node is dead")
        launch.report(error)  # first, since SLURM may lose the last lines of a task that ends
        print(f"error: {error}. This rank was at:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback()
        os._exit(1)


def limit_clean_up() -> None:
    """End this process after CLEAN_UP_S: a rank that failed must not wait in its clean-up for the others."""
    faulthandler.dump_traceback_later(CLEAN_UP_S, exit=True)
