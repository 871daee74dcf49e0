"""Whole or not at all, through no link, nothing left behind: on real files, with readers and kills."""

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
    said: list[str] = []
    monkeypatch.setattr(files, "sync", lambda path: said.append(f"sync {path.name}"))
    monkeypatch.setattr(files, "_exchange", lambda _, final: said.append(f"exchange {final.name}") or False)
    (tmp_path / "best").mkdir()
    fill(tmp_path / "best", "new")
    exchange = said.index("exchange best")
    assert {"sync a", "sync b"} < set(said[:exchange])
    assert said[exchange - 1].startswith("sync .best.tmp-") and said[exchange + 1 :] == [f"sync {tmp_path.name}"]


def test_a_reader_always_finds_a_whole_directory(tmp_path: Path) -> None:
    """Exchanging the names needs a file system that can (not NFS), as those of a test's directories can."""
    best = tmp_path / "best"
    fill(best, "0")
    ended, missing, mixed, reads = threading.Event(), [], [], [0]

    def read() -> None:
        while not ended.is_set():
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
                pass  # the old one, which is being removed
            finally:
                os.close(descriptor)

    thread = threading.Thread(target=read)
    thread.start()
    i = 0
    while i < 99 or (reads[0] <= 100 and i < 10_000):
        i += 1
        fill(best, str(i))
    ended.set()
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
def second_rename(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Names cannot be exchanged, and the rename that lets the new directory appear raises."""

    def fail(error: BaseException) -> None:
        real = Path.rename

        def rename(self: Path, target: Path) -> Path:
            if self.name.startswith(".best.tmp-"):
                raise error
            return real(self, target)

        monkeypatch.setattr(files, "_exchange", lambda *_: False)
        monkeypatch.setattr(Path, "rename", rename)

    return fail


def test_what_a_kill_between_two_renames_left_is_put_back_by_the_next_start(
    tmp_path: Path, second_rename: Callable[[BaseException], None]
) -> None:
    run = RunDirectory(tmp_path)
    fill(run.best, "old")
    fill(run.path / "export.replaced", "old")
    fill(run.export, "new")
    second_rename(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        fill(run.best, "new")
    assert not run.best.exists()
    with pytest.raises(UserError, match=r"best: no such directory, but .*/best.replaced is there"):
        read_hf_config(run.best)
    with run.lock():
        assert (run.best / "a").read_text() == "old" and (run.export / "a").read_text() == "new"
    assert not list(run.path.glob("*.replaced"))


def test_a_rename_that_is_refused_leaves_the_old_directory_in_its_place(
    tmp_path: Path, second_rename: Callable[[BaseException], None]
) -> None:
    fill(tmp_path / "best", "old")
    second_rename(OSError(5, "Input/output error"))
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
    assert not list((tmp_path / "step_1").iterdir())  # what can be removed is


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
        mine = [".export.123", "notes.tmp", ".keep.tmp-zzzzzzzz"]  # nobody's left-overs
        for name in mine:
            (run / name).touch()
        sweep(run)
        files.sweep_scratch()
        assert scratch.is_dir() and len(list(run.iterdir())) == 2 + len(mine)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    fill(run / "export", "new")  # outside a run's directory nobody else clears them away
    assert len(list(run.iterdir())) == 2 + len(mine)
    sweep(run)
    files.sweep_scratch()
    assert sorted(p.name for p in run.iterdir()) == sorted([*mine, "export"])
    assert not scratch.exists()


def test_scratch_goes_with_its_end() -> None:
    with contextlib.closing(Scratch()) as scratch:
        (scratch.path / "file").touch()
    assert not scratch.path.exists()


@pytest.mark.parametrize("kind", ["link", "dangling", "pipe", "device"])
def test_nothing_is_written_through_what_is_no_regular_file(kind: str, tmp_path: Path) -> None:
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
    if kind != "device":  # were it replaced, by root, every other program would suffer
        with pytest.raises(UserError, match=rf"{path} is a symbolic link, a pipe or a device"):
            write_atomically(path, "new")
    assert target.exists() == (kind == "link") and (kind != "link" or target.read_text() == "precious")


def test_a_thread_that_writes_after_the_end_writes_into_no_other_file(tmp_path: Path) -> None:
    ended = AppendedFile(tmp_path / "samples.jsonl")
    ended.close()
    with (tmp_path / "metrics.jsonl").open("wb") as other:
        with pytest.raises(UserError, match=r"samples.jsonl cannot be written"):
            ended.write(b"late")
        assert os.fstat(other.fileno()).st_size == 0


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    with full_disk.small(tmp_path / "disk", "64k") as place:
        yield place


def test_a_full_disk_is_one_line_and_costs_nothing(small: Path) -> None:
    write_atomically(small / "file", "old")
    grows = AppendedFile(small / "metrics.jsonl")
    fill(small / "best", "old")
    with pytest.raises(UserError, match=r"metrics.jsonl cannot be written: No space left on device"):
        grows.write(b"x" * 100_000)
    with pytest.raises(UserError, match=r"file cannot be written: No space left on device"):
        write_atomically(small / "file", "x" * 100_000)
    with pytest.raises(UserError, match=r"best cannot be written: No space left on device"):
        fill(small / "best", "x" * 100_000)
    with pytest.raises(OSError, match="No space left on device"):
        save_tensors({"a": torch.zeros(100_000)}, small / "best/model.safetensors")
    grows.close()
    assert (small / "file").read_text() == "old" and (small / "best/a").read_text() == "old"
    assert {"best", "file", "metrics.jsonl"} == {p.name for p in small.iterdir()}
