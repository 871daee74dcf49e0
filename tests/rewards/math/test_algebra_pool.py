"""The pool of algebra processes: threads, killed processes, closing; its size and the order change no verdict."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nemo_disco.rewards import MathGrader, Verdict
from nemo_disco.rewards.math import algebra_pool
from nemo_disco.rewards.math.algebra_process import processor_time

CASES = [(rf"\boxed{{{i}+x}}", f"x+{i if i % 3 else i + 1}") for i in range(24)]
EXPECTED = [1.0 if i % 3 else 0.0 for i in range(24)]


def descendants(parent: int) -> list[int]:
    """Process ids of all living descendants of a process, read from /proc."""
    pids = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # the process ended meanwhile
        if int(fields[1]) == parent and fields[0] != "Z":
            pid = int(status.parent.name)
            pids += [pid, *descendants(pid)]
    return pids


def server_pid(grader: MathGrader) -> int:
    process = grader._pool._process
    assert process is not None
    return process.pid


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_until(condition: object, seconds: float = 60.0) -> bool:
    """Wait for the condition; False if it does not hold within these seconds."""
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def test_any_thread_may_grade(grader: MathGrader) -> None:
    responses, answers = zip(*CASES, strict=True)
    with ThreadPoolExecutor(6) as threads:
        results = list(threads.map(lambda _: grader.grade(responses, answers), range(6)))
    assert results == [EXPECTED] * 6


def test_neither_size_nor_order_changes_the_result(grader: MathGrader) -> None:
    responses, answers = zip(*reversed(CASES), strict=True)
    with MathGrader(timeout=30.0, workers=1) as single:
        assert single.grade(responses, answers) == EXPECTED[::-1] == grader.grade(responses, answers)


def test_a_killed_process_is_replaced_and_its_answers_are_judged_again() -> None:
    with MathGrader(timeout=2.0, workers=2) as grader:
        assert grader.grade([r"\boxed{1+x}"], ["x+1"]) == [1.0]
        server = server_pid(grader)
        results: list[list[float]] = []
        responses, answers = [r"\boxed{9^{9^{9^{9}}}}", r"\boxed{9^{9^{9^{8}}}}", r"\boxed{2+x}"], ["5", "5", "x+2"]
        thread = threading.Thread(target=lambda: results.append(grader.grade(responses, answers)))
        thread.start()
        # Both children are busy with the power towers; the third answer waits.
        assert wait_until(lambda: [spent > 0.1 for spent in map(processor_time, descendants(server))] == [True] * 2)
        os.kill(server, signal.SIGKILL)
        thread.join()
        assert results == [[0.0, 0.0, 1.0]]
        assert server_pid(grader) != server


def test_a_child_that_dies_costs_its_answer_only() -> None:
    with MathGrader(timeout=20.0, workers=1) as grader:
        assert grader.grade([r"\boxed{1+x}"], ["x+1"]) == [1.0]
        [child] = descendants(server_pid(grader))
        before = processor_time(child)
        verdicts: list[Verdict] = []
        thread = threading.Thread(
            target=lambda: verdicts.extend(
                grader.grade_with_reasons([r"\boxed{9^{9^{9^{9}}}}", r"\boxed{2+x}"], ["5", "x+2"])
            )
        )
        thread.start()
        assert wait_until(lambda: processor_time(child) > before + 0.2)  # the child is busy with the power tower
        os.kill(child, signal.SIGKILL)
        thread.join()
        assert verdicts == [Verdict(0.0, "grader worker died"), Verdict(1.0, "correct")]


def test_a_request_to_stop_leaves_the_processes_alone() -> None:
    """SLURM signals all processes of a task; if an algebra process died of it, its answer would count as wrong."""
    with MathGrader(timeout=60.0, workers=2) as grader, ThreadPoolExecutor() as executor:
        grades = executor.submit(grader.grade, *map(list, zip(*CASES, strict=True)))
        assert wait_until(lambda: grader._pool._process is not None)
        while not grades.done():  # from the start of the server on
            server = server_pid(grader)
            for pid in (server, *descendants(server)):
                for number in (signal.SIGUSR1, signal.SIGTERM):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, number)
            time.sleep(0.01)
        assert grades.result() == EXPECTED


def test_closing_ends_the_processes() -> None:
    grader = MathGrader(timeout=30.0, workers=2)
    grader.grade([r"\boxed{1+x}", r"\boxed{2+x}"], ["x+1", "x+2"])
    server = server_pid(grader)
    processes = {server, *descendants(server)}
    assert len(processes) == 3
    grader.close()
    assert wait_until(lambda: not any(map(is_alive, processes)))
    with pytest.raises(RuntimeError, match="closed"):
        grader.grade([r"\boxed{1+x}"], ["x+1"])


def test_the_processes_end_with_a_killed_parent() -> None:
    code = (
        "import time; from nemo_disco.rewards import MathGrader; grader = MathGrader(timeout=1.0);"
        r"grader.grade([r'\boxed{1+x}'], ['x+1']); print('ready', flush=True);"
        r"grader.grade([r'\boxed{9^{9^{9^{9}}}}'] , ['5']); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n"
        processes = descendants(parent.pid)
        assert len(processes) >= 2
        parent.kill()
    assert wait_until(lambda: not any(map(is_alive, processes)))


def test_a_process_that_cannot_start_is_an_error_not_a_zero(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """If it gave reward 0, a broken installation would look like a bad policy."""
    (tmp_path / "latex2sympy2_extended.py").write_text("raise ImportError('broken')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with MathGrader() as grader, pytest.raises(RuntimeError, match="did not start"):
        grader.grade([r"\boxed{1+x}"], ["x+1"])


def test_a_module_in_the_working_directory_is_not_imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "sympy.py").write_text("raise SystemExit")
    monkeypatch.chdir(tmp_path)
    with MathGrader(timeout=30.0) as grader:
        assert grader.grade([r"\boxed{1+x}"], ["x+1"]) == [1.0]


def test_an_answer_is_tried_twice_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test lowers the limit to one attempt, so the first death of the server already decides."""
    monkeypatch.setattr(algebra_pool, "MAX_ATTEMPTS", 1)
    with MathGrader(timeout=5.0) as grader:
        future = grader._pool.submit("9^{9^{9^{9}}}", ["5"])
        assert wait_until(lambda: descendants(server_pid(grader)))
        os.kill(server_pid(grader), signal.SIGKILL)
        assert future.result() == "grader worker died"


@pytest.mark.parametrize(("timeout", "workers"), [(0.0, 1), (-1.0, 1), (float("nan"), 1), (1.0, 0)])
def test_bad_limits_are_refused(timeout: float, workers: int) -> None:
    with pytest.raises(ValueError, match="timeout"):
        MathGrader(timeout=timeout, workers=workers)


def test_lengths_must_agree(grader: MathGrader) -> None:
    with pytest.raises(ValueError, match="2 responses, but 1 answers"):
        grader.grade(["a", "b"], ["1"])
