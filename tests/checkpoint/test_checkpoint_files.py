"""A checkpoint is written whole or not at all: after a kill at any file operation, the last complete one is usable."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from nemo_disco.checkpoint import files
from nemo_disco.runtime import files as runtime_files

RECORD = {"format": 1, "code": {}, "dtype": "float32", "optimizer": None, "model": {}} | {
    "loop_state": {},
    "random_state": [],
}


class KilledError(BaseException):
    """Stands for kill -9; handlers of Exception do not catch it."""


def write(directory: Path, step: int, content: str, keep: int = 2) -> None:
    """Write a checkpoint with one file of that content, and rotate: the newest `keep` checkpoints stay."""
    work = files.begin(directory, step)
    (work / "__0_0.distcp").write_text(content)
    files.commit(work, directory / f"step_{step}", RECORD | {"step": step, "files": files.describe(work, 0)})
    files.rotate(directory, step, keep)


def content(path: Path) -> str:
    """The content of a checkpoint's file, after a check of the checkpoint."""
    record = files.read_record(path)
    files.check(path, record["files"], record["files"])
    assert path.name.removesuffix(".replaced") == f"step_{record['step']}"
    return (path / "__0_0.distcp").read_text()


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize(("step", "exchanges"), [(2, True), (2, False), (3, True)])
def test_killed_after_any_file_operation_the_last_complete_one_is_usable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, exchanges: bool
) -> None:
    """Step 2 replaces the newest checkpoint; step 3 adds one and rotates the oldest out.

    exchanges: whether the file system can exchange two names.
    """
    exchange = runtime_files._exchange if exchanges else lambda *_: False
    contents = set()
    for operations in range(100):
        directory = tmp_path / str(operations)
        write(directory, 1, "one")
        write(directory, 2, "two")
        with monkeypatch.context() as patch:
            left = operations

            def kill_when_none_is_left(operation):  # type: ignore[no-untyped-def]
                def counted(*args, **kwargs):  # type: ignore[no-untyped-def]
                    nonlocal left
                    if left == 0:
                        raise KilledError
                    left -= 1
                    return operation(*args, **kwargs)

                return counted

            for module, name in ((Path, "rename"), (Path, "mkdir"), (Path, "open"), (os, "unlink"), (os, "rmdir")):
                patch.setattr(module, name, kill_when_none_is_left(getattr(module, name)))
            patch.setattr(runtime_files, "sync", kill_when_none_is_left(runtime_files.sync))
            patch.setattr(runtime_files, "_exchange", kill_when_none_is_left(exchange))
            try:
                write(directory, step, "new")
                killed = False
            except KilledError:
                killed = True
        newest = content(next(reversed(files.list_checkpoints(directory).values())))
        assert newest in ("two", "new")
        contents.add(newest)
        write(directory, step, "newer")  # the run that resumes
        assert names(directory) == (["step_1", "step_2"] if step == 2 else ["step_2", "step_3"])
        assert content(directory / f"step_{step}") == "newer"
        if not killed:
            break
    assert not killed
    assert operations > 10
    assert contents == {"two", "new"}


def test_rotation_keeps_the_newest(tmp_path: Path) -> None:
    for step in (5, 10, 15, 100):
        write(tmp_path, step, str(step), keep=2)
    assert names(tmp_path) == ["step_100", "step_15"]


def test_rotation_removes_later_steps_of_an_abandoned_run(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        write(tmp_path, step, str(step), keep=3)
    write(tmp_path, 6, "6", keep=1)
    assert names(tmp_path) == ["step_6"]


def test_other_files_are_not_removed(tmp_path: Path) -> None:
    for name in ("notes", "step_5.txt", "step_x"):
        (tmp_path / name).mkdir()
    write(tmp_path, 5, "5", keep=1)
    assert names(tmp_path) == ["notes", "step_5", "step_5.txt", "step_x"]
    assert list(files.list_checkpoints(tmp_path)) == [5]


def test_a_missing_directory_has_no_checkpoints(tmp_path: Path) -> None:
    assert files.list_checkpoints(tmp_path / "none") == {}


def test_damage_is_named(tmp_path: Path) -> None:
    write(tmp_path, 1, "some content")
    intact = tmp_path / "step_1"

    def copy(name: str) -> Path:
        shutil.copytree(intact, tmp_path / name)
        return tmp_path / name

    (copy("missing") / "__0_0.distcp").unlink()
    (copy("truncated") / "__0_0.distcp").write_text("some")
    (copy("altered") / "__0_0.distcp").write_text("some contend")
    for kind, message in (
        ("missing", "__0_0.distcp is missing"),
        ("truncated", "__0_0.distcp has 4 bytes, 12 were written"),
        ("altered", "__0_0.distcp was altered"),
    ):
        with pytest.raises(files.DamagedError, match=message):
            content(tmp_path / kind)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda _: None, "is missing"),
        (lambda text: text[: len(text) // 2], "not valid JSON"),
        (lambda _: "[]", "not a JSON object"),
        (lambda _: "[" * 100_000, "not valid JSON"),
        (lambda text: text[:20] + "\0" + text[20:], "not valid JSON"),
        (lambda text: text.replace('"step": 1', '"step": 7'), "was altered"),
    ],
)
def test_a_damaged_record_is_named(tmp_path: Path, damage, message: str) -> None:  # type: ignore[no-untyped-def]
    write(tmp_path, 1, "content")
    file = tmp_path / "step_1" / files.RECORD
    text = damage(file.read_text())
    if text is None:
        file.unlink()
    else:
        file.write_text(text)
    with pytest.raises(files.DamagedError, match=f"{files.RECORD} {message}"):
        files.read_record(tmp_path / "step_1")


def test_the_record_is_plain_json_and_exact(tmp_path: Path) -> None:
    record = RECORD | {
        "step": 3,
        "files": {},
        "x": 0.1 + 0.2,
        "tiny": 5e-324,
        "text": "é\u2028",
        "none": None,
        "list": [1, True],
    }
    work = files.begin(tmp_path, 3)
    files.commit(work, tmp_path / "step_3", record)
    assert {key: value for key, value in files.read_record(tmp_path / "step_3").items() if key != "sha256"} == record
    assert json.loads((tmp_path / "step_3" / files.RECORD).read_text())["x"] == 0.1 + 0.2


def test_a_record_without_a_required_field_is_damaged(tmp_path: Path) -> None:
    """The record's checksum is right, so only the missing field gives the damage away."""
    for number, name in enumerate(RECORD.keys() | {"files", "step"}):
        work = files.begin(tmp_path, number)
        record = RECORD | {"step": number, "files": {}}
        files.commit(work, tmp_path / f"step_{number}", {key: value for key, value in record.items() if key != name})
        with pytest.raises(files.DamagedError, match=f"{files.RECORD} damaged: `{name}`"):
            files.read_record(tmp_path / f"step_{number}")


def test_an_entry_that_is_not_a_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    """Opening a FIFO would block, and a device could be read for ever."""
    write(tmp_path, 1, "content")
    shard = tmp_path / "step_1/__0_0.distcp"
    for replace in (lambda: os.mkfifo(shard), lambda: shard.symlink_to("/dev/zero"), shard.mkdir):
        shard.unlink()
        replace()
        with pytest.raises(files.DamagedError, match=r"__0_0.distcp (a FIFO|a symbolic link|a directory) stands"):
            content(tmp_path / "step_1")
        shard.rmdir() if shard.is_dir() else shard.unlink()
        shard.touch()


def test_a_file_with_a_checkpoints_name_is_no_checkpoint_and_is_replaced_like_a_link(tmp_path: Path) -> None:
    write(tmp_path / "archive", 1, "one")
    runs = tmp_path / "run"
    runs.mkdir()
    (runs / "step_1").symlink_to(tmp_path / "archive/step_1")
    (runs / "step_2").write_text("no checkpoint")
    assert list(files.list_checkpoints(runs)) == [1]
    for step in (2, 3):
        write(runs, step, str(step), keep=1)
        assert names(runs) == [f"step_{step}"] and content(runs / f"step_{step}") == str(step)
    assert content(tmp_path / "archive/step_1") == "one"
