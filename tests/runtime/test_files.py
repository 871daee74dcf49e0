"""Files and directories are written whole or not at all, through no link, and leave nothing behind: tested on real
files, with readers at the same time and with killed writers."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import full_disk
import pytest
import torch

from nemo_disco.models.hf_config import read_hf_config
from nemo_disco.runtime import files
from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.files import (
    AppendedFile,
    Scratch,
    atomic_directory,
    open_regular,
    remove,
    sweep,
    write_atomically,
)
from nemo_disco.runtime.rundir import RunDirectory
from nemo_disco.runtime.safetensor_writer import save_tensors


def fill(directory: Path, text: str) -> None:
    """Write a directory of two files that contain the text."""
    with atomic_directory(directory) as work:
        for name in ("a", "b"):
            (work / name).write_text(text)


def test_a_failed_write_leaves_the_old_text_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "file.txt"
    write_atomically(path, "old")

    def fail(_: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("nemo_disco.runtime.files.os.fsync", fail)
    with pytest.raises(UserError, match=r"file.txt cannot be written: Input/output error"):
        write_atomically(path, "new")
    with pytest.raises(UserError, match=r"best cannot be written: Input/output error"):
        fill(path.parent / "best", "new")
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr(files, "sync", lambda path: events.append(f"sync {path.name}"))
    monkeypatch.setattr(files, "_exchange", lambda _, final: events.append(f"exchange {final.name}") or False)
    (tmp_path / "best").mkdir()
    fill(tmp_path / "best", "new")
    exchange = events.index("exchange best")
    assert {"sync a", "sync b"} < set(events[:exchange])
    assert events[exchange - 1].startswith("sync .best.tmp-") and events[exchange + 1 :] == [f"sync {tmp_path.name}"]


def test_a_reader_always_finds_a_whole_directory(tmp_path: Path) -> None:
    """The file system must be able to exchange two names: NFS is not, those of temporary directories are."""
    best = tmp_path / "best"
    fill(best, "0")
    stop, missing, mixed, reads = threading.Event(), [], [], [0]

    def read() -> None:
        while not stop.is_set():
            reads[0] += 1
            try:
                descriptor = os.open(best, os.O_RDONLY)
            except FileNotFoundError:
                missing.append(1)
                continue
            try:
                names = [Path(f"/proc/self/fd/{descriptor}/{name}").read_text() for name in ("a", "b")]
                mixed.extend(names if names[0] != names[1] else [])
            except FileNotFoundError:
                pass  # the old directory, which is being removed
            finally:
                os.close(descriptor)

    thread = threading.Thread(target=read)
    thread.start()
    i = 0
    while i < 99 or (reads[0] <= 100 and i < 10_000):
        i += 1
        fill(best, str(i))
    stop.set()
    thread.join()
    assert reads[0] > 100 and (missing, mixed) == ([], [])
    assert [p.name for p in tmp_path.iterdir()] == ["best"]


def test_where_names_cannot_be_exchanged_two_renames_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_exchange", lambda *_: False)
    for text in ("1", "2"):
        fill(tmp_path / "best", text)
    assert (tmp_path / "best/a").read_text() == "2"
    assert [p.name for p in tmp_path.iterdir()] == ["best"]


@pytest.fixture
def fail_second_rename(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """fail_second_rename(error): from now on names cannot be exchanged, and the rename of a new directory raises."""

    def fail(error: BaseException) -> None:
        real = Path.rename

        def rename(self: Path, target: Path) -> Path:
            if self.name.startswith(".best.tmp-"):
                raise error
            return real(self, target)

        monkeypatch.setattr(files, "_exchange", lambda *_: False)
        monkeypatch.setattr(Path, "rename", rename)

    return fail


def test_the_next_start_restores_a_directory_after_a_kill_between_two_renames(
    tmp_path: Path, fail_second_rename: Callable[[BaseException], None]
) -> None:
    run = RunDirectory(tmp_path)
    fill(run.best, "old")
    fill(run.path / "export.replaced", "old")
    fill(run.export, "new")
    fail_second_rename(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        fill(run.best, "new")
    assert not run.best.exists()
    with pytest.raises(UserError, match=r"best: no such directory, but .*/best.replaced is there"):
        read_hf_config(run.best)
    with run.lock():
        assert (run.best / "a").read_text() == "old" and (run.export / "a").read_text() == "new"
    assert not list(run.path.glob("*.replaced"))


def test_a_rename_that_is_refused_leaves_the_old_directory_in_its_place(
    tmp_path: Path, fail_second_rename: Callable[[BaseException], None]
) -> None:
    fill(tmp_path / "best", "old")
    fail_second_rename(OSError(5, "Input/output error"))
    with pytest.raises(UserError, match=r"best cannot be written: Input/output error"):
        fill(tmp_path / "best", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["best"] and (tmp_path / "best/a").read_text() == "old"


def test_a_directory_that_cannot_be_removed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def busy(*_: object, **__: object) -> None:
        raise OSError(16, "Device or resource busy")

    fill(tmp_path / "step_1", "old")
    monkeypatch.setattr(os, "rmdir", busy)
    remove(tmp_path / "step_1")
    assert f"{tmp_path}/step_1" in caplog.text and "Device or resource busy" in caplog.text
    assert not list((tmp_path / "step_1").iterdir())  # its files are removed all the same


KILLED = """
import os, signal, sys, time
from pathlib import Path
from nemo_disco.runtime.files import Scratch, atomic_directory, atomic_file
here = Path(sys.argv[1])
scratch = Scratch()
with atomic_directory(here / "export") as directory, atomic_file(here / "report.html") as file:
    (directory / "model").write_text("half")
    file.write_text("half")
    print(scratch.path, flush=True)
    time.sleep(60)
"""


def test_left_overs_go_when_their_owner_is_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, temporary = tmp_path / "run", tmp_path / "temporary"
    run.mkdir()
    temporary.mkdir()
    command = [sys.executable, "-c", KILLED, str(run)]
    monkeypatch.setattr("nemo_disco.runtime.files.tempfile.gettempdir", lambda: str(temporary))
    monkeypatch.setattr(files, "_SETTLED_S", -1.0)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"TMPDIR": str(temporary)})
    try:
        assert process.stdout is not None
        scratch = Path(process.stdout.readline().strip())
        others = [".export.123", "notes.tmp", ".keep.tmp-zzzzzzzz"]  # similar names, but nobody's left-overs
        for name in others:
            (run / name).touch()
        sweep(run)
        files.sweep_scratch()
        assert scratch.is_dir() and len(list(run.iterdir())) == 2 + len(others)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    fill(run / "export", "new")  # removes the left-over of its dead writer, for directories that nobody sweeps
    assert len(list(run.iterdir())) == 2 + len(others)
    sweep(run)
    files.sweep_scratch()
    assert sorted(p.name for p in run.iterdir()) == sorted([*others, "export"])
    assert not scratch.exists()


def test_scratch_is_removed_when_it_is_closed() -> None:
    with contextlib.closing(Scratch()) as scratch:
        (scratch.path / "file").touch()
    assert not scratch.path.exists()


@pytest.mark.parametrize("kind", ["link", "dangling", "pipe", "device"])
def test_nothing_is_written_through_a_path_that_is_no_regular_file(kind: str, tmp_path: Path) -> None:
    target, path = tmp_path / "precious", tmp_path / "metrics.jsonl"
    if kind == "link":
        target.write_text("precious")
    if kind in ("link", "dangling"):
        path.symlink_to(target)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path = Path("/dev/full")
    for flags in (os.O_RDWR | os.O_CREAT, os.O_WRONLY | os.O_APPEND | os.O_CREAT):
        with pytest.raises(UserError, match=rf"{path} is a symbolic link, a pipe or a device"):
            open_regular(path, flags)
    if kind != "device":  # root could replace the device, which every other program needs
        with pytest.raises(UserError, match=rf"{path} is a symbolic link, a pipe or a device"):
            write_atomically(path, "new")
    assert target.exists() == (kind == "link") and (kind != "link" or target.read_text() == "precious")


def test_a_thread_that_writes_after_the_end_writes_into_no_other_file(tmp_path: Path) -> None:
    closed = AppendedFile(tmp_path / "samples.jsonl")
    closed.close()
    with (tmp_path / "metrics.jsonl").open("wb") as other:
        with pytest.raises(UserError, match=r"samples.jsonl cannot be written"):
            closed.write(b"late")
        assert os.fstat(other.fileno()).st_size == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A directory with 64 KiB of space."""
    with full_disk.mount_small_disk(tmp_path / "disk", "64k") as place:
        yield place


def test_a_full_disk_is_one_line_and_costs_nothing(small_disk: Path) -> None:
    write_atomically(small_disk / "file", "old")
    metrics = AppendedFile(small_disk / "metrics.jsonl")
    fill(small_disk / "best", "old")
    with pytest.raises(UserError, match=r"metrics.jsonl cannot be written: No space left on device"):
        metrics.write(b"x" * 100_000)
    with pytest.raises(UserError, match=r"file cannot be written: No space left on device"):
        write_atomically(small_disk / "file", "x" * 100_000)
    with pytest.raises(UserError, match=r"best cannot be written: No space left on device"):
        fill(small_disk / "best", "x" * 100_000)
    with pytest.raises(OSError, match="No space left on device"):
        save_tensors({"a": torch.zeros(100_000)}, small_disk / "best/model.safetensors")
    metrics.close()
    assert (small_disk / "file").read_text() == "old" and (small_disk / "best/a").read_text() == "old"
    assert {"best", "file", "metrics.jsonl"} == {p.name for p in small_disk.iterdir()}
