"""A program earns its reward only by passing the question's tests, and can do nothing but compute."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_disco.rewards.code.gold_tests import outputs_match
from nemo_disco.rewards.code.python_tests import PythonTests
from nemo_disco.runtime.errors import UserError

LIMIT = 2.0
TESTS = "assert double(2) == 4\nassert double(-3) == -6"
STDIN_TESTS = json.dumps({"inputs": ["3\n4\n", "5"], "outputs": ["6\n8", "10"]})
RIGHT = "def double(x):\n    return 2 * x"
PROGRAM = "import sys\nfor line in sys.stdin:\n    print(2 * int(line))"


@pytest.fixture(scope="module")
def verifier() -> Iterator[PythonTests]:
    with PythonTests(timeout=LIMIT, workers=2) as verifier:
        yield verifier


def block(code: str) -> str:
    """A response whose last code block is this code."""
    return f"Thus.</think> First ```python\n1/0\n``` then\n```python\n{code}\n```\nDone."


@pytest.mark.parametrize(
    ("code", "tests", "reason"),
    [
        (RIGHT, TESTS, "correct"),
        ("print('x' * 100)\n" + RIGHT, TESTS, "correct"),
        ("def double(x):\n    return x + 2", TESTS, "failed a test"),
        ("def double(x:", TESTS, "failed a test"),
        ("raise SystemExit(0)", TESTS, "failed a test"),
        ("import os\nos._exit(0)", TESTS, "failed a test"),
        (PROGRAM, STDIN_TESTS, "correct"),
        (PROGRAM + "\nraise SystemExit", STDIN_TESTS, "correct"),
        (PROGRAM.replace("2 *", "3 *"), STDIN_TESTS, "failed a test"),
        (PROGRAM + "\n1/0", STDIN_TESTS, "failed a test"),
        ("while True: pass", TESTS, "timeout"),
        ("import time\ntime.sleep(60)", STDIN_TESTS, "timeout"),
        ("x = [0] * 10**9", TESTS, "out of memory"),
        ("def f(n): return f(n + 1)\nf(0)", TESTS, "failed a test"),
        ("print('x' * 10**8)", STDIN_TESTS, "failed a test"),
    ],
)  # fmt: skip
def test_verdicts(verifier: PythonTests, code: str, tests: str, reason: str) -> None:
    start = time.monotonic()
    [verdict] = verifier.grade_with_reasons([block(code)], [tests])
    assert (verdict.reason, verdict.reward) == (reason, float(reason == "correct"))
    assert time.monotonic() - start < 50  # shorter than the sleep of 60 s; only processor time is limited


@pytest.mark.parametrize(
    ("output", "expected", "match"),
    [
        ("0.5 x\n", "0.50 x \n", True), ("1", "1.0", True), ("-2.50\n3", "-2.5\n3\n\n", True),
        ("0.51", "0.50", False), ("1.0", "1", False), ("01", "1", False), ("1e0", "1.0", False),
        ("0.5  x", "0.50 x", False), ("0.5", "0.50\n0.5", False),
    ],
)  # fmt: skip
def test_outputs_are_compared_as_a_judge_does(output: str, expected: str, match: bool) -> None:
    assert outputs_match(output, expected) is match


def test_a_response_without_code_and_one_without_thinking() -> None:
    with PythonTests(require_think=True) as verifier:
        verdicts = verifier.grade_with_reasons(["</think> 4", f"```python\n{RIGHT}\n```"], [TESTS] * 2)
    assert [v.reason for v in verdicts] == ["no code block", "no </think>"]


FORBIDDEN = {
    "socket": "import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)",
    "fork": "import os\nif os.fork() == 0:\n    open('{mark}', 'w')",
    "subprocess": "import subprocess\nsubprocess.run(['touch', '{mark}'])",
    "system": "import os\nassert os.system('touch {mark}') == 0",
    "spawn": "import os\nos.posix_spawn('/bin/touch', ['touch', '{mark}'], {{}})",
    "write": "open('{mark}', 'w').write('x')",
    "append": "open('{file}', 'a').write('x')",
    "remove": "import os\nos.remove('{file}')",
    "rename": "import os\nos.rename('{file}', '{mark}')",
    "truncate": "import os\nos.truncate('{file}', 0)",
    "kill": "import os\nos.kill({pid}, 0)",
    "limits": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40))",
    "libc": "import ctypes\nassert ctypes.CDLL(None).socket(2, 1, 0) >= 0",
    "trace": "import ctypes\nassert ctypes.CDLL(None).ptrace(16, {pid}, 0, 0) == 0",
    "environment": "import os\nassert 'PATH' in os.environ",
}


@pytest.mark.parametrize("code", FORBIDDEN.values(), ids=FORBIDDEN.keys())
def test_a_program_can_only_compute(verifier: PythonTests, tmp_path: Path, code: str) -> None:
    """The kernel refuses each attempt, so the program fails and leaves no trace."""
    file, mark = tmp_path / "kept", tmp_path / "mark"
    file.write_text("kept")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.0)
        program = code.format(port=server.getsockname()[1], mark=mark, file=file, pid=os.getpid())
        assert verifier.grade([block(program)], ["assert True"]) == [0.0]
        with pytest.raises(BlockingIOError):
            server.accept()
    assert not mark.exists() and file.read_text() == "kept"


def test_threads_and_the_standard_library_may_be_used(verifier: PythonTests) -> None:
    code = "import threading, math, collections, itertools, heapq, re\nt = threading.Thread(target=print)\nt.start()"
    assert verifier.grade([block(code + "\nt.join()")], ["assert math.gcd(4, 6) == 2"]) == [1.0]


def test_verdicts_of_concurrent_programs_are_in_order(verifier: PythonTests) -> None:
    codes = [f"x = {i}" for i in range(12)]
    assert verifier.grade([block(c) for c in codes], [f"assert x == {i % 3}" for i in range(12)]) == [
        float(i < 3) for i in range(12)
    ]


def test_unusable_tests_and_settings_are_refused(verifier: PythonTests) -> None:
    with pytest.raises(UserError, match="`inputs` and `outputs`"):
        verifier.grade([block(PROGRAM)], ['{"inputs": ["1"], "outputs": []}'])
    with pytest.raises(UserError, match="memory_mb=5"):
        PythonTests(memory_mb=5)
