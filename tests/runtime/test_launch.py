"""The launcher with real processes: one exit code, the rank that failed first is named, and no process is left."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from nemo_disco.generation.external.replica import Place, Replica
from nemo_disco.runtime import launch
from nemo_disco.runtime.errors import UserError

PRELUDE = """
import os, signal, sys, time
from pathlib import Path
from nemo_disco.runtime import launch
from nemo_disco.runtime.errors import UserError
launch.die_with_launcher()
rank, here = int(os.environ["RANK"]), Path(sys.argv[1])
(here / f"pid{rank}").write_text(str(os.getpid()))
"""


@pytest.fixture
def rank_command(tmp_path):
    """rank_command(body) is the command of ranks that run `body`, which may use `rank` and the directory `here`."""

    def command(body: str) -> list[str]:
        script = tmp_path / "rank.py"
        script.write_text(PRELUDE + textwrap.dedent(body))
        return [sys.executable, str(script), str(tmp_path)]

    return command


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_for(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"the condition did not hold within {seconds} s"
        time.sleep(0.02)


def pids(directory: Path, count: int) -> list[int]:
    """The process ids of the ranks, once all have written theirs."""
    files = [directory / f"pid{rank}" for rank in range(count)]
    wait_for(lambda: all(f.exists() and f.read_text() for f in files))
    return [int(f.read_text()) for f in files]


def start_launcher(command: list[str], processes: int) -> subprocess.Popen[str]:
    code = f"import sys; from nemo_disco.runtime.launch import spawn; sys.exit(spawn({processes}, sys.argv[1:]))"
    return subprocess.Popen([sys.executable, "-c", code, *command], stderr=subprocess.PIPE, text=True)


def test_every_rank_gets_its_place_and_one_rendezvous(rank_command, tmp_path):
    body = """
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
    (here / f"env{rank}").write_text(" ".join(os.environ[name] for name in names))
    """
    assert launch.spawn(3, rank_command(body)) == 0
    values = [(tmp_path / f"env{rank}").read_text().split() for rank in range(3)]
    assert [place[:4] for place in values] == [[str(r), str(r), "3", "3"] for r in range(3)]
    assert len({tuple(place[4:]) for place in values}) == 1
    address, port, threads = values[0][4:]
    assert address == "127.0.0.1" and int(port) > 0 and threads == os.environ.get("OMP_NUM_THREADS", "1")


def test_a_failing_rank_is_named_and_ends_its_stuck_peers(rank_command, tmp_path, capfd):
    body = """
    if rank == 1:
        error = ValueError("no such\\nlayer")
        launch.report(error)
        raise SystemExit(3)
    time.sleep(600)
    """
    started = time.monotonic()
    assert launch.spawn(3, rank_command(body)) == 3
    assert time.monotonic() - started < 60
    assert "error: rank 1 failed: ValueError: no such layer" in capfd.readouterr().err
    assert not any(is_alive(pid) for pid in pids(tmp_path, 3))


def test_a_killed_rank_is_blamed_though_its_peers_complain_first(rank_command, capfd):
    body = """
    if rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    other = here / "pid2"
    try:
        while not other.exists() or not other.read_text() or not os.kill(int(other.read_text()), 0):
            time.sleep(0.001)
    except ProcessLookupError:
        launch.report(ConnectionError("closed by peer"))
    raise SystemExit(1)
    """
    assert launch.spawn(3, rank_command(body)) == 128 + signal.SIGKILL
    error = capfd.readouterr().err
    assert error.startswith("error: rank 2 was killed by SIGKILL") and error.count("\n") == 1


def test_a_rank_that_aborts_after_a_peer_failed_is_not_blamed(rank_command, capfd):
    body = """
    if rank == 0:
        launch.report(ValueError("the cause"))
        sys.exit(1)
    while not os.path.exists(os.environ["NEMO_DISCO_REPORTS"] + "/0"):
        time.sleep(0.01)
    time.sleep(0.2)  # longer than the launcher's polling interval
    os.abort()
    """
    assert launch.spawn(2, rank_command(body)) == 1
    assert "error: rank 0 failed: ValueError: the cause" in capfd.readouterr().err


def test_bad_input_on_every_rank_is_one_line_and_exit_2(rank_command, capfd):
    body = """
    launch.report(UserError("model.path=x: no config.json there"))
    raise SystemExit(2)
    """
    assert launch.spawn(3, rank_command(body)) == 2
    assert capfd.readouterr().err == "error: model.path=x: no config.json there\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_request_to_stop_reaches_every_rank_and_the_run_ends_with_0(rank_command, tmp_path, number):
    body = f"""
    stopped = []
    signal.signal({int(number)}, lambda *_: stopped.append(1))
    (here / f"ready{{rank}}").touch()
    while not stopped:
        time.sleep(0.02)
    (here / f"saved{{rank}}").touch()
    """
    launcher = start_launcher(rank_command(body), 2)
    wait_for(lambda: all((tmp_path / f"ready{rank}").exists() for rank in range(2)))
    launcher.send_signal(number)
    assert launcher.wait(60) == 0
    assert all((tmp_path / f"saved{rank}").exists() for rank in range(2))
    assert launcher.stderr.read() == ""


def test_an_interrupt_ends_everything_with_130(rank_command, tmp_path):
    body = """
    try:
        (here / f"ready{rank}").touch()
        time.sleep(600)
    except KeyboardInterrupt:
        sys.exit(130)
    """
    launcher = start_launcher(rank_command(body), 2)
    wait_for(lambda: all((tmp_path / f"ready{rank}").exists() for rank in range(2)))
    children = pids(tmp_path, 2)
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(60) == 130
    assert launcher.stderr.read() == ""
    assert not any(is_alive(pid) for pid in children)


def test_the_ranks_die_with_a_launcher_that_is_killed(rank_command, tmp_path):
    launcher = start_launcher(rank_command("time.sleep(600)"), 2)
    children = pids(tmp_path, 2)
    launcher.kill()
    launcher.wait()
    wait_for(lambda: not any(is_alive(pid) for pid in children))


def test_under_a_launcher_world_size_rules(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert launch.world_size(devices=2, num_nodes=1, set_by_user=False) == 4
    assert launch.world_size(devices=2, num_nodes=2, set_by_user=True) == 4
    with pytest.raises(UserError, match=r"devices=2 x trainer.num_nodes=1 makes 2 processes, but .* 4"):
        launch.world_size(devices=2, num_nodes=1, set_by_user=True)
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(UserError, match="RANK is set but WORLD_SIZE"):
        launch.world_size(devices=1, num_nodes=1, set_by_user=False)


def test_without_a_launcher_one_machine_only(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert launch.world_size(devices=2, num_nodes=1, set_by_user=False) == 2
    with pytest.raises(UserError, match="num_nodes=2 needs a launcher"):
        launch.world_size(devices=2, num_nodes=2, set_by_user=True)


@pytest.mark.parametrize(
    ("gpu", "user", "expected"),
    [
        (True, {}, {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}),
        (True, {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}),
        (True, {"PYTORCH_ALLOC_CONF": "backend:native"}, {"PYTORCH_ALLOC_CONF": "backend:native"}),
        (False, {}, {"OMP_NUM_THREADS": "1"}),
        (False, {"OMP_NUM_THREADS": "4"}, {"OMP_NUM_THREADS": "4"}),
    ],
)
def test_torch_is_set_for_this_machine_unless_the_user_says_otherwise(
    gpu: bool, user: dict[str, str], expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "GPU_DRIVER", tmp_path if gpu else tmp_path / "none")
    monkeypatch.setattr(os, "environ", dict(user))
    launch.set_torch_defaults()
    assert dict(os.environ) == expected


def test_an_engine_does_not_get_the_runs_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    replica = Replica("0-0", Place("python", Path("log")), {})
    for value, expected in ((launch.GROWING_SEGMENTS, None), ("backend:native", "backend:native")):
        monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", value)
        assert replica._environment().get("PYTORCH_CUDA_ALLOC_CONF") == expected
