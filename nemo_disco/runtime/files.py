"""Writing files: whole or not at all, never through a link; the leftovers of killed processes are removed later.

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

from nemo_disco.runtime.errors import UserError

_TEMPORARY = re.compile(r"\..+\.tmp-[0-9a-f]{8}")
_REPLACED = ".replaced"
_SCRATCH = "nemo-disco-"
# A scratch directory is locked a moment after it was made, so younger ones are left alone.
_SETTLED_S = 60.0
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE}
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # <fcntl.h>, <linux/fs.h>
log = logging.getLogger(__name__)


@contextlib.contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Turn an OSError of this block (a disk that is full, over quota, read-only or broken) into a UserError that names
    `path`, and another file if that is at fault."""
    try:
        yield
    except OSError as error:
        reason, at_fault = error.strerror or str(error), error.filename
        if isinstance(at_fault, str) and Path(path).name not in at_fault:  # a temporary file's name has it
            reason = f"{at_fault}: {reason}"
        raise UserError(f"{path} cannot be written: {reason}; mend that, then run the same command again") from error


def describe_disk_error(error: Exception) -> UserError | None:
    """The UserError that describes a disk error and names its file; None for any other error, which may be a bug."""
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
            _lock(descriptor)
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
    """An empty directory to fill, which then takes the place of `target` (put_in_place). Leftovers of killed processes
    are removed first. Raises UserError if it cannot be written."""
    final = Path(target)
    with writing(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        for leftover in final.parent.glob(f".{glob.escape(final.name)}.tmp-*"):
            if _TEMPORARY.fullmatch(leftover.name) and not _is_locked(leftover, unknown=True):
                remove(leftover)
        work = _temporary_name(final)
        work.mkdir()
        descriptor = os.open(work, os.O_RDONLY)
        try:
            _lock(descriptor)
            yield work
            put_in_place(work, final)
        finally:
            remove(work)
            os.close(descriptor)


def put_in_place(work: Path, final: Path) -> None:
    """Rename the directory `work` to `final`, on the disk, in place of an older one: a reader finds the old one or the
    new. Raises OSError.

    File systems that cannot exchange two names (NFS) need two renames: in between, the old one is final.replaced, and
    after a crash at that moment `sweep` renames it back.
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
        old = backup_path(final)
        remove(old)
        final.rename(old)
        try:
            work.rename(final)
        except OSError:
            old.rename(final)
            raise
        remove(old)
    sync(final.parent)


def backup_path(final: Path) -> Path:
    """The path at which put_in_place keeps the old directory for a moment, if the file system needs it."""
    return final.with_name(final.name + _REPLACED)


def sync(path: Path) -> None:
    """Wait until a file's content, or a directory's entries, are on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (error.errno == errno.EINVAL and path.is_dir()):  # some file systems cannot sync a directory
            raise
    finally:
        os.close(descriptor)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two names in one step; False if the system or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(second))


# --- files that are written in place ---


def open_regular(path: Path, flags: int) -> int:
    """A descriptor of a regular file, for writing. Raises UserError for a link or a pipe, at once."""
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
    """A regular file that is appended to or cut; the change is on the disk when a method returns. Raises UserError."""

    def __init__(self, path: Path) -> None:
        self._path, self._descriptor = path, open_regular(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        with writing(self._path):
            while view:
                view = view[os.write(self._descriptor, view) :]
            os.fsync(self._descriptor)

    def cut(self, size: int) -> None:
        """Keep the first `size` bytes."""
        with writing(self._path):
            if os.fstat(self._descriptor).st_size > size:
                os.ftruncate(self._descriptor, size)
                os.fsync(self._descriptor)

    def close(self) -> None:
        """Close. A thread that still writes then gets a UserError; its bytes never reach another file."""
        descriptor, self._descriptor = self._descriptor, -1
        with writing(self._path):  # NFS may refuse only now
            os.close(descriptor)


# --- leftovers of killed processes ---


def sweep(directory: Path, also: re.Pattern[str] | None = None) -> None:
    """Remove the leftovers of atomic writes by dead processes in a directory, and undo their unfinished renames.

    also: pattern of further names of leftovers. Those locked by a living process stay. Raises UserError.
    """
    with writing(directory):
        for path in sorted(directory.iterdir()) if directory.is_dir() else ():
            if path.name.endswith(_REPLACED) and path.is_dir():  # a put_in_place was killed between its two renames
                final = path.with_name(path.name.removesuffix(_REPLACED))
                remove(path) if os.path.lexists(final) else path.rename(final)
            elif (_TEMPORARY.fullmatch(path.name) or (also and also.fullmatch(path.name))) and not _is_locked(path):
                remove(path)


def first_free(places: Iterable[Path]) -> Path:
    """The first path that does not exist, not even as a broken link."""
    return next(place for place in places if not os.path.lexists(place))


def remove(path: Path) -> None:
    """Remove a file, a link or a whole directory, if it exists. Parts of a directory that cannot be removed stay, with
    a warning; a file that cannot be removed raises OSError."""
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
            log.warning("%s is not needed any more and cannot be removed: %s; remove it yourself", path, error)


class Scratch:
    """A private directory of this process in the system's temporary folder; `close` removes it. Raises UserError."""

    def __init__(self) -> None:
        with writing(tempfile.gettempdir()):
            self.path = Path(tempfile.mkdtemp(prefix=_SCRATCH))  # mode 0700
            self._descriptor = os.open(self.path, os.O_RDONLY)
        _lock(self._descriptor)

    def close(self) -> None:
        remove(self.path)
        os.close(self._descriptor)


def sweep_scratch() -> None:
    """Remove the Scratch directories of this user's dead processes."""
    for path in Path(tempfile.gettempdir()).glob(f"{_SCRATCH}*"):
        with contextlib.suppress(OSError):
            status = path.lstat()
            is_own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
            if is_own and time.time() - status.st_mtime > _SETTLED_S and not _is_locked(path, unknown=True):
                remove(path)


def _temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}")


def _lock(descriptor: int) -> None:
    """Lock a file until its descriptor is closed, as the end of this process does too."""
    with contextlib.suppress(OSError):  # a file system without flock
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_locked(path: Path, unknown: bool = False) -> bool:
    """True if a living process has locked the path; `unknown` if the file system cannot tell."""
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
