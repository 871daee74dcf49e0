"""The lock of a run directory: a second job is refused at once while the holder lives, and a killed holder frees it."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nemo_disco.runtime import rundir
from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.rundir import RunDirectory

HOLD = """
import sys, time
from nemo_disco.runtime.rundir import RunDirectory
with RunDirectory(sys.argv[1]).lock():
    print("held", flush=True)
    {body}
"""

StartHolder = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start_holder(tmp_path: Path) -> Iterator[StartHolder]:
    """start_holder(body) starts a process that holds the lock of tmp_path and then runs `body`."""
    started: list[subprocess.Popen[str]] = []

    def start(body: str = "time.sleep(60)") -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLD.format(body=body), str(tmp_path)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):  # the test killed the process, and it had no children
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_the_layout(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "new" / "run")
    run.create()
    run.create()
    assert {p.name for p in run.path.iterdir()} == {"tensorboard", "checkpoints", "rollouts", "evaluation"}
    assert run.rollout_file(7) == run.path / "rollouts" / "step_7.jsonl"
    assert list(run.checkpoints.iterdir()) == []


def test_a_directory_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written.*exp_manager.explicit_log_dir") as error:
        RunDirectory(tmp_path / "file" / "run").create()
    assert "\n" not in str(error.value)


def test_a_directory_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nemo_disco.runtime.rundir.tempfile.TemporaryFile", fail)
    with pytest.raises(UserError, match="No space left on device"):
        RunDirectory(tmp_path).create()


def test_the_second_job_is_told_who_holds_the_lock(tmp_path: Path, start_holder: StartHolder) -> None:
    process = start_holder()
    with (
        pytest.raises(UserError, match=rf"in use by process {process.pid} on {re.escape(rundir.HOST)} \(since "),
        RunDirectory(tmp_path).lock(),
    ):
        pass
    with pytest.raises(UserError, match=str(process.pid)), RunDirectory(tmp_path).lock():
        pass  # the refused job does not free the lock


def test_a_killed_holder_leaves_the_lock_free(tmp_path: Path, start_holder: StartHolder) -> None:
    process = start_holder()
    process.kill()
    process.wait()
    with RunDirectory(tmp_path).lock():
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert (tmp_path / ".lock").read_text() == ""


def test_a_forked_worker_does_not_keep_a_dead_parents_lock(tmp_path: Path, start_holder: StartHolder) -> None:
    process = start_holder("import os; os.fork() or print('up', flush=True); time.sleep(60)")
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.kill()
    process.wait()
    with RunDirectory(tmp_path).lock():
        pass


def test_an_error_inside_frees_the_lock(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), RunDirectory(tmp_path).lock():
        raise ZeroDivisionError
    with RunDirectory(tmp_path).lock():
        pass


def write_record(path: Path, beat: int) -> None:
    """Write the lock's record as a holder on another machine does. beat: one digit, so that every write has the same
    length and a reader always finds a whole record."""
    record = {"host": "another-node", "pid": 4242, "started": "2026-01-01 00:00:00", "beat": beat}
    with path.open("r+" if path.exists() else "w") as file:
        file.write(json.dumps(record))


def test_a_silent_holder_on_another_machine_died(tmp_path: Path) -> None:
    write_record(tmp_path / ".lock", 3)
    start = time.monotonic()
    with RunDirectory(tmp_path).lock(silence_s=0.3):
        assert time.monotonic() - start >= 0.3


def test_a_beating_holder_on_another_machine_is_alive(tmp_path: Path) -> None:
    write_record(tmp_path / ".lock", 3)
    stop = threading.Event()

    def beat() -> None:
        for number in itertools.cycle(range(4, 10)):
            if stop.wait(0.2):
                return
            write_record(tmp_path / ".lock", number)

    other = threading.Thread(target=beat, daemon=True)
    other.start()
    with pytest.raises(UserError, match="process 4242 on another-node"), RunDirectory(tmp_path).lock(silence_s=10):
        pass
    stop.set()
    other.join()


def test_the_holder_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rundir, "HEARTBEAT_S", 0.02)
    with RunDirectory(tmp_path).lock():
        deadline = time.monotonic() + 60
        while json.loads((tmp_path / ".lock").read_text())["beat"] < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_left_overs_of_killed_lives_are_swept_under_the_lock(tmp_path: Path) -> None:
    RunDirectory(tmp_path).create()
    stale = [".export.4242.tmp/model", ".best.4242.old/model", ".best.tmp-0123abcd/model", ".report.html.4242"]
    stale += [".metrics.jsonl.4242", ".metrics.jsonl.tmp-0123abcd", "rollouts/.step_3.jsonl.4242"]
    stale += ["evaluation/.test.step_3.json.4242", ".meeting.1.0.0"]
    others = ["notes.4242", ".hidden", "export/model", ".meeting.2.0.0"]
    for name in (*stale, *others):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    os.utime(tmp_path / ".meeting.1.0.0", (0, 0))
    with RunDirectory(tmp_path).lock():
        assert [name for name in stale if (tmp_path / name).parent.exists() and (tmp_path / name).exists()] == []
        assert all((tmp_path / name).exists() for name in others)


def remove_lock(path: Path) -> None:
    (path / ".lock").unlink()


def replace_lock(path: Path) -> None:
    (path / ".lock").unlink()
    (path / ".lock").touch()


def remove_directory(path: Path) -> None:
    shutil.rmtree(path)


def replace_directory(path: Path) -> None:
    path.rename(path.with_name("moved"))
    RunDirectory(path).create()
    (path / ".lock").touch()


TAKE = [remove_lock, replace_lock, remove_directory, replace_directory]


@pytest.mark.parametrize("take", TAKE)
def test_a_lock_that_is_taken_away_stops_the_next_write(take: Callable[[Path], None], tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.check_lock()  # does nothing without a lock
    with run.lock():
        run.check_lock()
        take(run.path)
        with pytest.raises(UserError, match=r"run/.lock, .* was (removed|replaced): another run may be writing there"):
            run.check_lock()


def test_a_file_server_that_is_away_for_a_while_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rundir, "HEARTBEAT_S", 1000)
    monkeypatch.setattr(rundir, "RETRY_S", 0.01)
    real, answers = os.stat, [errno.ESTALE, errno.EIO, errno.ETIMEDOUT]

    def fail_or_stat(path: Path, **options: bool) -> os.stat_result:
        if Path(path).name == ".lock" and answers:
            number = answers.pop() if len(answers) > 1 or not forever else answers[0]
            raise OSError(number, os.strerror(number))
        return real(path, **options)

    forever = False
    run = RunDirectory(tmp_path)
    with run.lock():
        monkeypatch.setattr("nemo_disco.runtime.rundir.os.stat", fail_or_stat)
        run.check_lock()
        assert caplog.text.count("cannot be examined") == 1 and answers == []
        forever, answers[:] = True, [errno.ESTALE]
        monkeypatch.setattr(rundir, "PATIENCE_S", 0.05)
        with pytest.raises(UserError, match="could not be examined for"):
            run.check_lock()
        monkeypatch.setattr("nemo_disco.runtime.rundir.os.stat", real)


def test_a_lock_that_is_taken_away_ends_a_process_that_writes_nothing(tmp_path: Path) -> None:
    code = HOLD.replace("with Run", "from nemo_disco.runtime import rundir\nrundir.HEARTBEAT_S = 0.01\nwith Run")
    command = [sys.executable, "-c", code.format(body="time.sleep(60)"), str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    (tmp_path / ".lock").unlink()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2
    assert re.fullmatch(r"error: .*/.lock, .* was removed: .*\n", stderr)
    assert not (tmp_path / ".lock").exists()


def test_the_lock_is_not_taken_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match=r"\.lock is a symbolic link"), RunDirectory(tmp_path).lock():
        pass
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_beat_that_cannot_be_written_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rundir, "HEARTBEAT_S", 0.01)
    errors: list[UserError] = []
    monkeypatch.setattr(rundir, "_end", errors.append)
    with RunDirectory(tmp_path).lock():
        real = os.pwrite

        def fail(*_: object) -> int:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("nemo_disco.runtime.rundir.os.pwrite", fail)
        time.sleep(0.1)
        assert errors == []
        monkeypatch.setattr(rundir, "PATIENCE_S", 0.0)
        deadline = time.monotonic() + 60
        while not errors:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        monkeypatch.setattr("nemo_disco.runtime.rundir.os.pwrite", real)
    assert ".lock cannot be written: No space left on device" in str(errors[0])
