"""Dead ranks and nodes, noticed: every rank says "here" every few seconds, rank 0 listens to all and all to rank 0.

A connection to a node without power breaks only after minutes or hours; this takes SILENCE_S. Two daemon threads and a
key-value store; must not import torch.
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
# Longer than what holds Python's lock (loading a library from a cold file system); with the beats, half a minute.
SILENCE_S = 30.0
FAREWELL_S = 5.0
CLEAN_UP_S = 20.0
_DONE = "done"


class Store(Protocol):
    """What torch's stores can do."""

    def set(self, key: str, value: str, /) -> None: ...
    def multi_get(self, keys: list[str], /) -> Sequence[bytes]: ...
    def set_timeout(self, timeout: datetime.timedelta, /) -> None: ...
    def clone(self) -> Store: ...


class Watchdog:
    """Ends this process when a rank that it watches is silent: rank 0 watches all, the others rank 0.

    Call `start` on every rank, and `stop` before the process group is taken down.
    """

    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        self._meeting, self._rank = store, rank
        self._watched = [r for r in range(world_size) if r != rank] if rank == 0 else [0]
        self._beats: dict[int, bytes] = {}
        self._nodes: dict[int, str] = {}
        self._stopped = threading.Event()
        self._beating = threading.Thread(target=self._beat, name="watchdog-beat", daemon=True)

    def start(self) -> None:
        """Wait until the watched ranks are there too, and begin."""
        self._meeting.set(f"node/{self._rank}", srun.node())
        self._meeting.set(f"beat/{self._rank}", "0")
        names = self._meeting.multi_get([f"node/{rank}" for rank in self._watched])
        self._nodes = {rank: name.decode() for rank, name in zip(self._watched, names, strict=True)}
        # A connection of its own, since a blocking call on the other would block the beats; it gives up soon.
        self._line = self._meeting.clone()
        self._line.set_timeout(datetime.timedelta(seconds=4 * BEAT_S))
        self._beating.start()
        threading.Thread(target=self._judge, name="watchdog-judge", daemon=True).start()

    def stop(self) -> None:
        """Say goodbye, so that a silence from now on means nothing. Rank 0, which holds the store, leaves last."""
        self._stopped.set()
        self._beating.join(FAREWELL_S)

    def _beat(self) -> None:
        beat = 0
        keys = [f"beat/{rank}" for rank in self._watched]
        while not self._stopped.wait(BEAT_S):
            beat += 1
            try:
                self._line.set(f"beat/{self._rank}", str(beat))
                self._beats = dict(zip(self._watched, self._line.multi_get(keys), strict=True))
            except RuntimeError:
                # Rank 0 is gone or slow: _judge counts. A late answer must not be taken for that of the next question.
                with contextlib.suppress(RuntimeError):
                    self._line = self._line.clone()
        with contextlib.suppress(RuntimeError):
            self._line.set(f"beat/{self._rank}", _DONE)
            deadline = time.monotonic() + FAREWELL_S
            while self._rank == 0 and time.monotonic() < deadline:
                if all(value == _DONE.encode() for value in self._line.multi_get(keys)):
                    break
                time.sleep(0.02)

    def _judge(self) -> None:
        """Counts checks, not seconds: a job that was suspended as a whole goes on."""
        heard, silent = self._beats, dict.fromkeys(self._watched, 0)
        while not self._stopped.wait(BEAT_S):
            now = self._beats
            for rank in self._watched:
                alive = now.get(rank) != heard.get(rank) or now.get(rank) == _DONE.encode()
                silent[rank] = 0 if alive else silent[rank] + 1
                if silent[rank] * BEAT_S >= SILENCE_S:
                    self._end(rank)
            heard = now

    def _end(self, rank: int) -> None:
        who = f"rank {rank} on {self._nodes[rank]}"
        error = TimeoutError(f"{who} has been silent for {SILENCE_S:.0f} s: its process or its node is dead")
        launch.report(error)  # first: SLURM may lose the last lines of a task that ends
        print(f"error: {error}. Where this rank was:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback()
        os._exit(1)


def end_soon() -> None:
    """A rank that failed ends within CLEAN_UP_S, whatever its clean-up waits for."""
    faulthandler.dump_traceback_later(CLEAN_UP_S, exit=True)
