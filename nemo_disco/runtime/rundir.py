"""The directory of a run: its layout, a test that it can be written, and the lock that keeps a second job out of it.

Rank 0 alone creates and locks it. The lock ends with the process (flock), so a killed run can be resumed at once; its
half-written files are then removed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import re
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict

from nemo_disco.runtime import launch
from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.files import open_regular, sweep, writing
from nemo_disco.runtime.saved_files import Count, FileError, read_json

HOST = socket.gethostname()
HEARTBEAT_S = 5.0
# Where flock does not work, a holder is taken for dead after this long without a heartbeat.
SILENCE_S = 60.0
# A heartbeat that cannot be written, or a lock that cannot be examined, is tried again (a file server restarts), but
# for less time than other processes wait before they take this one for dead.
PATIENCE_S = 30.0
RETRY_S = 0.5
NO_FLOCK_HERE = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}
# Leftovers of versions before the atomic writer of files.py.
_OLD_LEFTOVERS = re.compile(
    r"\.(config\.yaml|metrics\.jsonl|report\.html|mlflow\.run_id|best|export|step_\d+\.jsonl|.+\.step_\d+\.json)"
    r"\.\d+(\.tmp|\.old)?"
)
_MEETING = ".meeting.*"  # files of srun.py, left behind by a rank that is killed while the ranks meet
_MEETING_S = 24 * 3600.0

log = logging.getLogger(__name__)
MODEL_RECORD = "nemo_disco.json"


class ModelRecord(TypedDict):
    """The file MODEL_RECORD in a model directory that a run wrote (export/, best/). A run that resumes at an earlier
    step reads it to tell whether the directory is of a later step.

    step: of training. best/ also has score, its mean Pass@1, and of, a hash of the evaluation sets of that score.
    """

    step: Count
    score: NotRequired[float]
    of: NotRequired[str]


def as_files(record: ModelRecord) -> dict[str, str]:
    """The record as files of a model directory: text by name."""
    return {MODEL_RECORD: json.dumps(record) + "\n"}


def read_model_record(directory: Path) -> ModelRecord | None:
    """The record of a directory; None if there is no such directory, or no readable record in it."""
    with contextlib.suppress(FileError):
        return read_json(directory / MODEL_RECORD, ModelRecord)
    return None


class RunDirectory:
    """The paths of a run; nothing is created before `create` or `lock`.

    config.yaml, metrics.jsonl, tensorboard/, checkpoints/, rollouts/, evaluation/, best/, export/, report.html, and
    profile/ if steps are profiled.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.rollouts = self.path / "rollouts"
        self.evaluation = self.path / "evaluation"
        self.export = self.path / "export"
        self.best = self.path / "best"
        self.report = self.path / "report.html"
        self.lock_file = self.path / ".lock"
        self.profile = self.path / "profile"
        self._descriptor: int | None = None  # of the lock file, while this process has the lock

    def rollout_file(self, step: int) -> Path:
        """File of the saved rollouts of a step: one JSON object per line."""
        return self.rollouts / f"step_{step}.jsonl"

    def create(self) -> None:
        """Make the directories. Raises UserError if one of them cannot be made or written."""
        # Not best/ and export/: they are renamed into place when complete.
        directories = (self.tensorboard, self.checkpoints, self.rollouts, self.evaluation)
        for directory in (self.path, *directories):
            try:
                directory.mkdir(parents=True, exist_ok=True)
                # Permission bits do not show everything (root, read-only mounts, quotas): write a file.
                with tempfile.TemporaryFile(dir=directory) as probe:
                    probe.write(b"0")
            except OSError as error:
                raise UserError(
                    f"run directory {self.path} cannot be written: {directory}: {error.strerror}; "
                    "set exp_manager.explicit_log_dir to a directory of yours"
                ) from error

    @contextlib.contextmanager
    def lock(self, silence_s: float = SILENCE_S) -> Iterator[None]:
        """Make the directories and lock the run. Raises UserError naming the holder if a living process has the lock.

        flock decides on one machine, and on file systems that share it between machines. On other file systems the
        record of a holder on another machine is watched for `silence_s` seconds: without a heartbeat it has died.
        """
        self.create()
        descriptor = open_regular(self.lock_file, os.O_RDWR | os.O_CREAT)
        _lock_descriptors.add(descriptor)
        try:
            if not (self._flock(descriptor) and self._holder().get("host", HOST) == HOST):
                self._refuse_beating_holder(silence_s)
            self._descriptor = descriptor
            self.check_lock()  # the file may have been removed after it was opened and before it was locked
            with self._heartbeat(descriptor):
                self._sweep()
                yield
        finally:
            self._descriptor = None
            _lock_descriptors.discard(descriptor)
            os.close(descriptor)

    def check_lock(self) -> None:
        """Raise UserError if this process had the lock and the directory or the lock file was removed or replaced: the
        files there may be another run's. Call it before any file of the run is written.

        A file system that does not answer (NFS: ESTALE, EIO, ETIMEDOUT) is tried again: nothing was removed.
        """
        deadline = time.monotonic() + PATIENCE_S
        warned = False
        while self._descriptor is not None:
            try:
                state = self._state_of_lock(self._descriptor)
            except OSError as error:
                if time.monotonic() > deadline:
                    raise self._lost_error(f"could not be examined for {PATIENCE_S:g} s ({error.strerror})") from error
                if not warned:
                    words = "%s cannot be examined (%s): trying again for %g s"
                    log.warning(words, self.lock_file, error.strerror, PATIENCE_S)
                    warned = True
                time.sleep(RETRY_S)
                continue
            if state:
                raise self._lost_error(state)
            return

    def _state_of_lock(self, descriptor: int) -> str:
        """Change of the lock file: "was removed", "was replaced", or "" for none. Raises OSError if it is unknown."""
        try:
            present = os.stat(self.lock_file, follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError):
            return "was removed"
        locked = os.fstat(descriptor)
        return "" if (present.st_dev, present.st_ino) == (locked.st_dev, locked.st_ino) else "was replaced"

    def _lost_error(self, event: str) -> UserError:
        return UserError(
            f"{self.lock_file}, by which this run holds its directory, {event}: another run may be writing there, and "
            "this one ends; start it again to go on from its last checkpoint, if that is still there"
        )

    def _sweep(self) -> None:
        """Remove half-written files of killed processes."""
        for directory in (self.path, self.rollouts, self.evaluation, self.path / "evaluate"):
            sweep(directory, also=_OLD_LEFTOVERS)
        for path in self.path.glob(_MEETING):
            if time.time() - path.lstat().st_mtime > _MEETING_S:
                path.unlink(missing_ok=True)

    def _flock(self, descriptor: int) -> bool:
        """True if flock granted the lock; False if the file system has no flock. Raises UserError if another has it."""
        with writing(self.lock_file):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise self._taken_error() from None
            except OSError as error:
                if error.errno not in NO_FLOCK_HERE:
                    raise
                return False
        return True

    def _holder(self) -> dict[str, Any]:
        try:
            return read_json(self.lock_file, dict[str, Any])
        except FileError:
            return {}

    def _taken_error(self) -> UserError:
        holder = self._holder()
        who = f"process {holder.get('pid', '?')} on {holder.get('host', '?')} (since {holder.get('started', '?')})"
        return UserError(
            f"run directory {self.path} is in use by {who}; wait for it, end it, or set exp_manager.explicit_log_dir"
        )

    def _refuse_beating_holder(self, silence_s: float) -> None:
        first = self._holder()
        if not first:
            return
        log.info("%s was last locked on %s: watching it for %.0f s", self.path, first.get("host"), silence_s)
        deadline = time.monotonic() + silence_s
        while time.monotonic() < deadline:
            time.sleep(min(1.0, silence_s / 10))
            if self._holder() != first:
                raise self._taken_error()

    @contextlib.contextmanager
    def _heartbeat(self, descriptor: int) -> Iterator[None]:
        """Write the holder's record, raise its `beat` until the exit, then empty it. Ends the process if the lock is
        lost or the record cannot be written for PATIENCE_S."""
        record: dict[str, Any] = {
            "host": HOST,
            "pid": os.getpid(),
            "started": time.strftime("%Y-%m-%d %H:%M:%S"),
            "beat": 0,
        }
        ended = threading.Event()

        def write() -> None:
            with writing(self.lock_file):
                os.pwrite(descriptor, json.dumps(record).encode().ljust(256) + b"\n", 0)
                os.fsync(descriptor)

        def beat() -> None:
            last_write = time.monotonic()
            while not ended.wait(HEARTBEAT_S):
                record["beat"] += 1
                try:
                    self.check_lock()
                except UserError as error:
                    _end(error)
                try:
                    write()
                    last_write = time.monotonic()
                except UserError as error:
                    if time.monotonic() - last_write > PATIENCE_S:
                        _end(error)

        write()
        thread = threading.Thread(target=beat, name="run-directory-heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, 0)


# Locked descriptors, which a forked worker closes: else it would keep the lock of a parent that was killed.
_lock_descriptors: set[int] = set()


def _close_in_child() -> None:
    for descriptor in _lock_descriptors:
        os.close(descriptor)
    _lock_descriptors.clear()


os.register_at_fork(after_in_child=_close_in_child)


def _end(error: UserError) -> None:
    """End the process from a thread, with the message and exit code of bad input."""
    if not launch.report(error):
        print(f"error: {error}", file=sys.stderr, flush=True)
    os._exit(2)
