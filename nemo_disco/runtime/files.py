"""Writing files: whole or not at all, never through a link, and without leaving anything of a killed process for ever.

The one atomic writer of the program. Imports nothing heavy and knows no run; an error of the disk is one line.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import glob
import logging
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType

from nemo_disco.runtime.errors import UserError

_TEMPORARY = re.compile(r"\..+\.tmp-[0-9a-f]{8}")
_REPLACED = ".replaced"
_SCRATCH = "nemo-disco-"
# A directory of the temporary folder is held from the moment after it was made.
_SETTLED_S = 60.0
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE}
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # <fcntl.h>, <linux/fs.h>
log = logging.getLogger(__name__)


@contextlib.contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Turn an OSError of this block (a full disk, a quota, a read-only or broken one) into a UserError that names
    `path`, and another file where that is at fault."""
    try:
        yield
    except OSError as error:
        why, at_fault = error.strerror or str(error), error.filename
        if isinstance(at_fault, str) and Path(path).name not in at_fault:  # a temporary file's name has it
            why = f"{at_fault}: {why}"
        raise UserError(f"{path} cannot be written: {why}; mend that, then run the same command again") from error


def refusal_of_disk(error: Exception) -> UserError | None:
    """The line for an error of the disk that names its file; None for any other error, which may be a bug."""
    if isinstance(error, OSError) and error.errno in _DISK and error.filename is not None:
        return UserError(f"{os.fsdecode(error.filename)}: {error.strerror}; mend that, then run the same command again")
    return None


# --- whole or not at all ---


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """An empty file to write, which then takes the place of `path`: a reader, or a crash at any moment, sees the old
    content or the new, whole and on the disk. Its directory is made. Raises UserError if it cannot be written."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(path) and stat.S_IFMT(path.lstat().st_mode) not in (stat.S_IFREG, stat.S_IFDIR):
            raise _not_regular(path)  # root would replace /dev/null by a file
        work = _temporary_name(path)
        descriptor = os.open(work, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            _hold(descriptor)
            yield work
            sync(work)
            os.replace(work, path)
            sync(path.parent)
        finally:
            work.unlink(missing_ok=True)
            os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Replace a file by one with this text, as atomic_file does."""
    with atomic_file(path) as work:
        work.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def atomic_directory(target: str | Path) -> Iterator[Path]:
    """An empty directory to fill, which then takes the place of `target`, as put_in_place says. What killed processes
    left of earlier ones goes first. Raises UserError if it cannot be written."""
    final = Path(target)
    with writing(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        for left in final.parent.glob(f".{glob.escape(final.name)}.tmp-*"):
            if _TEMPORARY.fullmatch(left.name) and not _is_held(left, unknown=True):
                remove(left)
        work = _temporary_name(final)
        work.mkdir()
        descriptor = os.open(work, os.O_RDONLY)
        try:
            _hold(descriptor)
            yield work
            put_in_place(work, final)
        finally:
            remove(work)
            os.close(descriptor)


def put_in_place(work: Path, final: Path) -> None:
    """Give the directory `work` the name `final`, on the disk, in place of what has that name; a reader finds the one
    or the other. Raises OSError.

    File systems that cannot exchange two names (NFS) need two renames: between them the old one is final.replaced, and
    after a crash there `sweep` gives it its name again.
    """
    for directory, _, names in os.walk(work):
        for name in names:
            sync(Path(directory, name))
        sync(Path(directory))
    if not os.path.lexists(final):
        work.rename(final)
    elif _exchange(work, final):
        remove(work)
    else:
        old = replaced(final)
        remove(old)
        final.rename(old)
        try:
            work.rename(final)
        except OSError:
            old.rename(final)
            raise
        remove(old)
    sync(final.parent)


def replaced(final: Path) -> Path:
    """The name under which put_in_place keeps the old directory for a moment, if the file system needs it."""
    return final.with_name(final.name + _REPLACED)


def _put_back(final: Path) -> None:
    """Finish what a put_in_place that was killed between its renames had in hand."""
    old = replaced(final)
    if old.is_dir():
        remove(old) if os.path.lexists(final) else old.rename(final)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (error.errno == errno.EINVAL and path.is_dir()):  # some file systems cannot sync a directory
            raise
    finally:
        os.close(descriptor)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False where the system or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(other))


# --- by a known name ---


def open_regular(path: Path, flags: int) -> int:
    """A descriptor of a regular file that is to be written; no link is followed and no pipe waited for. Raises
    UserError."""
    with writing(path):
        try:
            descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENXIO):
                raise _not_regular(path) from None
            raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _not_regular(path)
    return descriptor


def _not_regular(path: Path) -> UserError:
    return UserError(f"{path} is a symbolic link, a pipe or a device, through which nothing is written: remove it")


class AppendedFile:
    """A regular file that grows, or is cut: it is so on the disk when a method returns. Raises UserError."""

    def __init__(self, path: Path) -> None:
        self._path, self._descriptor = path, open_regular(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        with writing(self._path):
            while view:
                view = view[os.write(self._descriptor, view) :]
            os.fsync(self._descriptor)

    def cut(self, size: int) -> None:
        """Drop what stands behind the first `size` bytes."""
        with writing(self._path):
            if os.fstat(self._descriptor).st_size > size:
                os.ftruncate(self._descriptor, size)
                os.fsync(self._descriptor)

    def close(self) -> None:
        """A thread that still writes afterwards gets a UserError: the number may be another file's by then."""
        descriptor, self._descriptor = self._descriptor, -1
        with writing(self._path):  # NFS may refuse only now
            os.close(descriptor)


# --- what killed processes left ---


def sweep(directory: Path, also: re.Pattern[str] | None = None) -> None:
    """Remove what dead processes left of atomic writes in a directory, and put back what they had in hand.

    also: further names that are left-overs. Those that a living process holds stay. Raises UserError.
    """
    with writing(directory):
        for path in sorted(directory.iterdir()) if directory.is_dir() else ():
            if path.name.endswith(_REPLACED):
                _put_back(path.with_name(path.name.removesuffix(_REPLACED)))
            elif (_TEMPORARY.fullmatch(path.name) or (also and also.fullmatch(path.name))) and not _is_held(path):
                remove(path)


def first_free(places: Iterable[Path]) -> Path:
    """The first of them where nothing is, not even a link that leads nowhere."""
    return next(place for place in places if not os.path.lexists(place))


def remove(path: Path) -> None:
    """Remove a file, a link or a whole directory, if it is there. What of a directory cannot be removed stays, and is
    said in a warning; a file that cannot be raises OSError."""
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return
    shutil.rmtree(path, ignore_errors=True)  # goes on after an error
    if os.path.lexists(path):
        try:
            shutil.rmtree(path)  # for the error
        except FileNotFoundError:  # another process removes it too
            pass
        except OSError as error:
            log.warning("%s is of no use any more and cannot be removed: %s; remove it yourself", path, error)


class Scratch:
    """A directory of this process alone in the system's temporary folder; `close` removes it. Raises UserError."""

    def __init__(self) -> None:
        with writing(tempfile.gettempdir()):
            self.path = Path(tempfile.mkdtemp(prefix=_SCRATCH))  # mode 0700
            self._descriptor = os.open(self.path, os.O_RDONLY)
        _hold(self._descriptor)

    def close(self) -> None:
        remove(self.path)
        os.close(self._descriptor)

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()


def sweep_scratch() -> None:
    """Remove the Scratch directories of this user's dead processes."""
    for path in Path(tempfile.gettempdir()).glob(f"{_SCRATCH}*"):
        with contextlib.suppress(OSError):
            found = path.lstat()
            mine = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
            if mine and time.time() - found.st_mtime > _SETTLED_S and not _is_held(path, unknown=True):
                remove(path)


def _temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}")


def _hold(descriptor: int) -> None:
    """Mark as in use until the descriptor is closed, by this process's death too."""
    with contextlib.suppress(OSError):  # a file system without flock
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_held(path: Path, unknown: bool = False) -> bool:
    """Whether a living process holds it; `unknown` where the file system cannot say."""
    flags = os.O_NOFOLLOW | os.O_NONBLOCK | (os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        descriptor = os.open(path, flags)
    except OSError:
        return unknown
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return unknown
    finally:
        os.close(descriptor)
    return False
