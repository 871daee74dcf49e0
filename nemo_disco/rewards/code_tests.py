"""Rewards code that passes its tests: each program in a process of its own, confined by the kernel (sandbox.py).

Starts processes and waits for them; never runs an answer in this one. `PythonTests` says what is not promised.
"""

from __future__ import annotations

import json
import re
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from nemo_disco.rewards import verdict
from nemo_disco.rewards.verdict import Verdict
from nemo_disco.rewards.verifiers import Alternatives, Verifier
from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.files import Scratch
from nemo_disco.runtime.signals import spared_children

SANDBOX = Path(__file__).with_name("sandbox.py")
OUTPUT = 1 << 20  # bytes that a program may print
_BLOCK = re.compile(r"```(?:python|py|python3)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True)
class _Ended:
    """How a program ended: its exit code (None: the time was up), what it printed, the end of what it complained."""

    code: int | None
    printed: str
    complaint: str


class PythonTests(Verifier):
    """Reward 1 where the last fenced block of Python passes the question's tests.

    A gold answer is Python that asserts, run after the block in the same names; or a JSON object with `inputs` and
    `outputs`, lists of texts: the block is run once an input as a program, and prints the output (spaces at line ends
    and empty lines at the end apart). Several gold answers: each is a set of tests, and passing any is enough.

    Linux holds the limits (seccomp and resource limits; no privileges needed): `timeout` seconds for all tests of a
    response, `memory_mb` of address space, 1 MB of output; no other process, no socket, no file opened for writing, no
    file or permission changed, no signal sent, nothing of the environment. Standard library only.

    Not promised: what this user may read can be read (keep secrets and test files elsewhere); threads may run within
    the limits; a bug of the kernel is no wall; and a program that is made to cheat can forge a pass of asserting tests,
    which share its process, but not of inputs and outputs, which are compared here. For answers of a hostile author use
    a container or a virtual machine around the whole run.
    """

    def __init__(
        self, require_think: bool = False, timeout: float = 5.0, workers: int = 2, memory_mb: int = 512
    ) -> None:
        """Raises UserError where this kernel cannot confine a program: then nothing is run at all."""
        super().__init__(require_think)
        if memory_mb < 64:
            raise UserError(f"reward.parameters.memory_mb={memory_mb}: Python alone needs 64")
        self._timeout, self._memory = timeout, memory_mb << 20
        _check_confinement()
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="code-tests")

    def grade_with_reasons(self, responses: Sequence[str], answers: Sequence[Alternatives]) -> list[Verdict]:
        if len(responses) != len(answers):
            raise ValueError(f"{len(responses)} responses, but {len(answers)} answers")
        golds = [(a,) if isinstance(a, str) else tuple(a) for a in answers]
        return list(self._pool.map(self._verdict, responses, golds))

    def close(self) -> None:
        """Waits for the programs that run; each ends within its time."""
        self._pool.shutdown(cancel_futures=True)

    def _judge(self, said: str, golds: tuple[str, ...]) -> Verdict:
        blocks = _BLOCK.findall(said)
        if not blocks:
            return Verdict.of(verdict.NO_CODE)
        reasons = [self._passes(blocks[-1], gold) for gold in golds] or [verdict.UNPARSABLE_GOLD]
        return Verdict.of(verdict.CORRECT if verdict.CORRECT in reasons else reasons[0])

    def _passes(self, code: str, tests: str) -> str:
        """The reason."""
        cases = _cases(tests)
        if cases is None:
            token = secrets.token_hex(16)
            ended = self._run(code, tests=tests, token=token, timeout=self._timeout)
            return _reason(ended, right=ended.printed.endswith(token))
        deadline = time.monotonic() + self._timeout
        for given, wanted in cases:
            ended = self._run(code, stdin=given, timeout=max(0.0, deadline - time.monotonic()))
            reason = _reason(ended, right=_lines(ended.printed) == _lines(wanted))
            if reason != verdict.CORRECT:
                return reason
        return verdict.CORRECT

    def _run(self, code: str, *, timeout: float, tests: str = "", stdin: str = "", token: str = "") -> _Ended:
        job: dict[str, Any] = {"code": code, "tests": tests, "stdin": stdin, "token": token}
        job |= {"memory": self._memory, "seconds": int(timeout) + 1, "output": OUTPUT}
        return _run(job, timeout)


def _run(job: dict[str, Any], timeout: float) -> _Ended:
    with tempfile.TemporaryFile() as printed, tempfile.TemporaryFile() as complaint, spared_children():
        with Scratch() as empty:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(SANDBOX)],
                stdin=subprocess.PIPE, stdout=printed, stderr=complaint, cwd=empty, env={}, start_new_session=True,
            )  # fmt: skip
            try:
                process.communicate(json.dumps(job).encode("utf-8", errors="replace"), timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        code = process.returncode
        printed.seek(0)
        complaint.seek(0)
        said = complaint.read(OUTPUT).decode(errors="replace")
        return _Ended(None if code == -9 else code, printed.read(OUTPUT).decode(errors="replace"), said[-2000:])


@cache
def _check_confinement() -> None:
    """Raises UserError unless a program that opens a socket is refused."""
    tests = (
        "import socket\ntry:\n    socket.socket()\nexcept PermissionError:\n    pass\nelse:\n    raise SystemExit(1)"
    )
    job = {"code": "", "tests": tests, "stdin": "", "token": "ok", "memory": 512 << 20, "seconds": 10, "output": OUTPUT}
    ended = _run(job, 10.0)
    if ended.printed != "ok":
        said = (ended.complaint.strip().splitlines() or [f"it ended with {ended.code}"])[-1]
        raise UserError(
            f"reward.verifier=python_tests: this machine cannot confine a program ({said}); it needs Linux with "
            "seccomp on x86_64 or aarch64"
        )


def _cases(tests: str) -> list[tuple[str, str]] | None:
    """(input, output) pairs, where the tests are JSON; None where they are Python."""
    if not tests.lstrip().startswith("{"):
        return None
    try:
        said = json.loads(tests)
        return [(str(i), str(o)) for i, o in zip(said["inputs"], said["outputs"], strict=True)]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"tests of a question are not `inputs` and `outputs` of one length ({error}): {tests:.80}"
        ) from error


def _reason(ended: _Ended, right: bool) -> str:
    if ended.code is None or ended.code == -24:  # SIGXCPU
        return verdict.TIMEOUT
    if "MemoryError" in ended.complaint.rpartition("\n  ")[2]:
        return verdict.NO_MEMORY
    return verdict.CORRECT if ended.code == 0 and right else verdict.FAILED_TEST


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]
