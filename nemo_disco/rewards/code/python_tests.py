"""The verifier `python_tests`: reward 1 for a response whose program passes the question's tests.

A program runs in a confined process (sandbox.py), a script of tests in a second one; values and outputs are compared in
this process. Nothing from a response is run or parsed here. docs/rewards.md has the threat model.
"""

from __future__ import annotations

import json
import queue
import re
import secrets
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from nemo_disco.rewards import verdict
from nemo_disco.rewards.code import gold_tests
from nemo_disco.rewards.code.blocks import find_defining_programs, find_reading_programs
from nemo_disco.rewards.code.gold_tests import CallCases, ExpressionCases, ProgramCases, Script
from nemo_disco.rewards.code.remote_names import UNSENDABLE
from nemo_disco.rewards.code.sandbox import Limits, Outcome, Sandbox
from nemo_disco.rewards.grader import GoldAnswers, pair
from nemo_disco.rewards.text_graders import TextGrader
from nemo_disco.rewards.verdict import Verdict
from nemo_disco.runtime.errors import UserError

EXTRA_OUTPUT = 1 << 20  # bytes that a program may print, beyond twice its expected output
_NUMPY = re.compile(r"\bnumpy\b")
_SIGXCPU = -24
# Multiples of its time limit that a program may wait for its tests, and they for it: on a busy machine either is slow.
_PROGRAM_WAITS, _TESTS_WAIT = 3, 10
_Sandboxes = tuple[Sandbox, Sandbox]  # for programs, for tests that run beside a program
# Each of these attempts must be refused, or no program is run at all.
_PROBE = """
import ctypes, os, socket
for attempt in (socket.socket, os.fork, lambda: os.open("/dev/null", os.O_WRONLY), lambda: os.kill(os.getppid(), 0),
                lambda: os.chmod("/dev/null", 0o666), lambda: os.execv("/bin/true", ["true"])):
    try:
        attempt()
    except PermissionError:
        pass
    else:
        raise SystemExit(1)
print("confined")
"""
_read_cases = lru_cache(maxsize=64)(gold_tests.read_cases)  # the responses of a group share their tests


@dataclass
class _Budget:
    """Processor seconds and seconds asleep that are left for one gold answer's tests; each starts at the time limit."""

    cpu_seconds: float
    sleep_seconds: float
    memory_bytes: int

    def limits(self, output_bytes: int) -> Limits:
        return Limits(self.cpu_seconds, self.sleep_seconds, self.memory_bytes, output_bytes)

    def charge(self, outcome: Outcome) -> None:
        self.cpu_seconds -= outcome.cpu_seconds
        self.sleep_seconds -= outcome.sleep_seconds


class PythonTests(TextGrader):
    """Reward 1 if the response's program passes the question's tests.

    The program is the last fenced block that is marked as Python (or unmarked, if none is marked) and is valid Python;
    blocks that read an input, or define a name that the tests use, come before all others.

    A gold answer is Python that asserts, run with the program's names; or JSON, in the forms of
    `gold_tests.read_cases`: inputs and outputs of programs (compared without spaces at line ends and empty lines at the
    end), or with `fn_name` of calls of a function or of a method of `Solution`. With several gold answers, passing the
    tests of one is enough.

    The kernel confines a program to computing (seccomp_filter.py): `timeout` processor seconds for all tests of a
    gold answer and as many asleep, `memory_mb` of address space beyond Python's own, output a megabyte beyond twice the
    expected one. docs/rewards.md lists what this guarantees and what it does not.
    """

    def __init__(
        self, require_think: bool = False, timeout: float = 5.0, workers: int = 2, memory_mb: int = 512
    ) -> None:
        """Raises UserError if this machine cannot confine a program; then none is run."""
        super().__init__(require_think)
        if memory_mb < 64:
            raise UserError(f"reward.parameters.memory_mb={memory_mb} is too little: a Python program needs 64 or more")
        self._timeout, self._memory_bytes = timeout, memory_mb << 20
        self._sandboxes: list[_Sandboxes] = [(Sandbox(), Sandbox()) for _ in range(workers)]
        try:
            _check_confinement(self._sandboxes[0][0])
        except UserError:
            self._close_sandboxes()
            raise
        self._idle: queue.LifoQueue[_Sandboxes] = queue.LifoQueue()
        for sandboxes in reversed(self._sandboxes):
            self._idle.put(sandboxes)
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="code-tests")

    def grade_with_reasons(self, responses: Sequence[str], answers: Sequence[GoldAnswers]) -> list[Verdict]:
        return list(self._pool.map(lambda arguments: self._verdict(*arguments), pair(responses, answers)))

    def close(self) -> None:
        """End the sandboxes, after the programs that run; each of these ends within its time limit."""
        self._pool.shutdown(cancel_futures=True)
        self._close_sandboxes()

    def _close_sandboxes(self) -> None:
        pairs, self._sandboxes = self._sandboxes, []
        for sandboxes in pairs:
            for sandbox in sandboxes:
                sandbox.close()

    def _judge(self, text: str, golds: tuple[str, ...]) -> str:
        sandboxes = self._idle.get()
        try:
            reasons = [self._test(sandboxes, text, gold) for gold in golds] or [verdict.UNPARSABLE_GOLD]
        finally:
            self._idle.put(sandboxes)
        return verdict.CORRECT if verdict.CORRECT in reasons else reasons[0]

    def _test(self, sandboxes: _Sandboxes, text: str, gold: str) -> str:
        """The verdict's reason for one gold answer. text: the response without its thinking."""
        cases, budget = _read_cases(gold), _Budget(self._timeout, self._timeout, self._memory_bytes)
        if isinstance(cases, ProgramCases):
            programs = find_reading_programs(text)
            return _test_outputs(sandboxes[0], programs, cases, budget) if programs else verdict.NO_CODE
        programs = find_defining_programs(text, cases.function if isinstance(cases, CallCases) else gold)
        if not programs:
            return verdict.NO_CODE
        if isinstance(cases, Script):
            return _test_by_script(sandboxes, programs, cases, budget)
        return _test_values(sandboxes[0], programs, cases, budget)


def _test_outputs(sandbox: Sandbox, programs: list[str], cases: ProgramCases, budget: _Budget) -> str:
    job, preload = _encode_job(programs, as_module=False), _preload(programs)
    for stdin, expected in cases.pairs:
        if min(budget.cpu_seconds, budget.sleep_seconds) <= 0:
            return verdict.TIMEOUT
        limits = budget.limits(EXTRA_OUTPUT + 2 * len(expected.encode(errors="replace")))
        outcome = sandbox.run(job, limits, stdin=stdin.encode(errors="replace"), preload=preload)
        budget.charge(outcome)
        passed = gold_tests.outputs_match(outcome.stdout.decode(errors="replace"), expected)
        if (reason := _reason(outcome, passed)) != verdict.CORRECT:
            return reason
    return verdict.CORRECT


def _test_values(sandbox: Sandbox, programs: list[str], cases: CallCases | ExpressionCases, budget: _Budget) -> str:
    if isinstance(cases, CallCases):
        test: dict[str, Any] = {"function": cases.function, "calls": cases.arguments}
    else:
        test = {"setup": cases.setup, "expressions": cases.expressions}
    expected = json.dumps(cases.expected, default=list, skipkeys=True)
    limits = budget.limits(EXTRA_OUTPUT + 2 * len(expected))
    outcome = sandbox.run(_encode_job(programs, as_module=True, test=test), limits, preload=_preload(programs))
    return _reason(outcome, _values_match(outcome.report, cases))


def _test_by_script(sandboxes: _Sandboxes, programs: list[str], script: Script, budget: _Budget) -> str:
    """Run the program and the tests in one confined process each; the tests request values over a socket."""
    token = secrets.token_hex(16)
    to_program, to_tests = socket.socketpair()
    limits = budget.limits(EXTRA_OUTPUT)
    tests_limits = replace(limits, sleep_seconds=_TESTS_WAIT * limits.sleep_seconds)
    with ThreadPoolExecutor(1) as thread, to_program, to_tests:
        future = thread.submit(
            sandboxes[0].run,
            _encode_job(programs, as_module=True, test={"linked": True}),
            replace(limits, sleep_seconds=_PROGRAM_WAITS * limits.sleep_seconds),
            preload=_preload(programs),
            link=to_tests,
        )
        job = _encode_job([], as_module=True, test={"tests": script.text, "token": token})
        tests = sandboxes[1].run(job, tests_limits, preload=_preload([script.text]), link=to_program)
        program = future.result()
    if tests.report == UNSENDABLE:
        return verdict.UNSUPPORTED_TEST
    reason = _reason(tests, tests.report == token.encode())
    timed_out = program.timed_out or program.cpu_seconds + tests.cpu_seconds > limits.cpu_seconds
    if timed_out or reason != verdict.CORRECT:
        # When a program ends early its tests end too: the program's own reason comes first.
        program_reason = verdict.TIMEOUT if timed_out else _reason(program, passed=True)
        return program_reason if program_reason != verdict.CORRECT else reason
    return reason


def _encode_job(programs: list[str], as_module: bool, test: dict[str, Any] | None = None) -> bytes:
    """A job as confined_process.py reads it. as_module: run the program as a module, for what `test` does with it."""
    return f"{json.dumps([programs, as_module])}\n{json.dumps(test)}\n".encode()


def _preload(programs: list[str]) -> tuple[str, ...]:
    return ("numpy",) if any(map(_NUMPY.search, programs)) else ()


def _values_match(report: bytes, cases: CallCases | ExpressionCases) -> bool:
    """True if the report, which the program may have forged, holds the expected values."""
    try:
        values = [gold_tests.decode_plain(item) for item in json.loads(report)]
        if len(values) != len(cases.expected):
            return False
        if isinstance(cases, CallCases):
            return all(gold_tests.as_json(v) in passing for v, passing in zip(values, cases.expected, strict=True))
        return all(value == expected for value, expected in zip(values, cases.expected, strict=True))
    except (ValueError, TypeError, KeyError, ArithmeticError, RecursionError):
        return False


def _check_confinement(sandbox: Sandbox) -> None:
    """Raises UserError unless a program that tries to do more than compute is refused."""
    limits = Limits(cpu_seconds=10.0, sleep_seconds=10.0, memory_bytes=512 << 20, output_bytes=EXTRA_OUTPUT)
    outcome = sandbox.run(_encode_job([_PROBE], as_module=False), limits, stdin=b"")
    if outcome.stdout != b"confined\n":
        problem = (outcome.stderr.strip().splitlines() or [f"the probe ended with {outcome.exit_code}"])[-1]
        raise UserError(
            f"reward.verifier=python_tests: this machine's kernel does not confine programs ({problem}); the sandbox "
            "needs Linux with seccomp on x86_64 or aarch64"
        )


def _reason(outcome: Outcome, passed: bool) -> str:
    """The verdict's reason for one job. passed: its output or values are the expected ones."""
    if outcome.timed_out or outcome.exit_code == _SIGXCPU:
        return verdict.TIMEOUT
    if "MemoryError" in outcome.stderr.rpartition("\n  ")[2]:
        return verdict.NO_MEMORY
    return verdict.CORRECT if outcome.exit_code == 0 and passed else verdict.FAILED_TEST
