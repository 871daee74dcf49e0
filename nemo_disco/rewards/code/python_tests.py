"""Rewards code that passes its tests: each program in a process of its own, confined by the kernel (sandbox_server.py).

Outputs are compared here, or in a second confined process that runs the tests, neither of which a program can read; an
answer is never run or parsed here. The threat model stands in docs/data.md.
"""

from __future__ import annotations

import json
import queue
import re
import secrets
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from typing import Any

from nemo_disco.rewards import verdict
from nemo_disco.rewards.code import gold_tests
from nemo_disco.rewards.code.blocks import programs_that_define, programs_that_read
from nemo_disco.rewards.code.gold_tests import CallCases, ExpressionCases, ProgramCases, Script
from nemo_disco.rewards.code.remote_names import UNSENDABLE
from nemo_disco.rewards.code.sandbox import Ended, ForkServer, Limits
from nemo_disco.rewards.grader import GoldAnswers, pair
from nemo_disco.rewards.text_graders import TextGrader
from nemo_disco.rewards.verdict import Verdict
from nemo_disco.runtime.errors import UserError

OUTPUT = 1 << 20  # bytes that a program may print, beyond twice what it is to print
_NUMPY = re.compile(r"\bnumpy\b")
_SIGXCPU = -24
# Times a response's time that a program may wait for its tests, and these for it: on a busy machine either is slow.
_PROGRAM_WAITS, _TESTS_WAIT = 3, 10
_Servers = tuple[ForkServer, ForkServer]  # for programs, for tests
# What each of these tries must be refused, or no program is run at all.
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
_read_cases = lru_cache(maxsize=64)(gold_tests.read_cases)  # a group's responses share theirs


class _Budget:
    """The time that is left to one response's programs: processor seconds, and seconds asleep."""

    def __init__(self, timeout: float, memory: int) -> None:
        self._spent = self._asleep = timeout
        self._memory = memory

    @property
    def left(self) -> bool:
        return self._spent > 0 and self._asleep > 0

    def limits(self, output: int) -> Limits:
        return Limits(seconds=self._spent, asleep=self._asleep, memory=self._memory, output=output)

    def charge(self, ended: Ended) -> None:
        self._spent -= ended.spent
        self._asleep -= ended.asleep


class PythonTests(TextGrader):
    """Reward 1 where the response's program passes the question's tests.

    The program is the last fenced block marked as Python (or unmarked, where none is) that is Python, and that reads an
    input or defines what the tests name where there is one that does.

    A gold answer is Python that asserts, run with the program's names; or JSON, in the forms of
    `gold_tests.read_cases`: inputs and outputs of programs (compared apart from spaces at line ends and empty lines at
    the end), or with `fn_name` of calls of a function or of a method of `Solution`. Several gold answers: each is a set
    of tests, and passing any is enough.

    The kernel confines a program to computing (seccomp_filter.py): `timeout` processor seconds for all tests of a
    response and as many asleep, `memory_mb` of address space beyond Python's own, an output a megabyte larger than the
    right one. docs/data.md says what is promised of that, and what is not.
    """

    def __init__(
        self, require_think: bool = False, timeout: float = 5.0, workers: int = 2, memory_mb: int = 512
    ) -> None:
        """Raises UserError where this machine cannot confine a program: then nothing is run at all."""
        super().__init__(require_think)
        if memory_mb < 64:
            raise UserError(f"reward.parameters.memory_mb={memory_mb}: a Python program needs 64")
        self._timeout, self._memory = timeout, memory_mb << 20
        # Each worker's: one for programs, one for tests that run beside a program.
        self._all_servers = [(ForkServer(), ForkServer()) for _ in range(workers)]
        try:
            _check_confinement(self._all_servers[0][0])
        except UserError:
            self._close_servers()
            raise
        self._servers: queue.LifoQueue[_Servers] = queue.LifoQueue()
        for servers in reversed(self._all_servers):
            self._servers.put(servers)
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="code-tests")

    def grade_with_reasons(self, responses: Sequence[str], answers: Sequence[GoldAnswers]) -> list[Verdict]:
        return list(self._pool.map(lambda arguments: self._verdict(*arguments), pair(responses, answers)))

    def close(self) -> None:
        """Waits for the programs that run; each ends within its time."""
        self._pool.shutdown(cancel_futures=True)
        self._close_servers()

    def _close_servers(self) -> None:
        pairs, self._all_servers = self._all_servers, []
        for servers in pairs:
            for server in servers:
                server.close()

    def _judge(self, said: str, golds: tuple[str, ...]) -> Verdict:
        servers = self._servers.get()
        try:
            reasons = [self._reason(servers, said, gold) for gold in golds] or [verdict.UNPARSABLE_GOLD]
        finally:
            self._servers.put(servers)
        return Verdict.from_reason(verdict.CORRECT if verdict.CORRECT in reasons else reasons[0])

    def _reason(self, servers: _Servers, said: str, gold: str) -> str:
        server, cases = servers[0], _read_cases(gold)
        budget = _Budget(self._timeout, self._memory)
        if isinstance(cases, ProgramCases):
            programs = programs_that_read(said)
            return _reason_of_programs(server, programs, cases, budget) if programs else verdict.NO_CODE
        programs = programs_that_define(said, cases.function if isinstance(cases, CallCases) else gold)
        if not programs:
            return verdict.NO_CODE
        if isinstance(cases, Script):
            return _reason_of_script(servers, programs, cases, budget)
        return _reason_of_names(server, programs, cases, budget)


def _reason_of_programs(server: ForkServer, programs: list[str], cases: ProgramCases, budget: _Budget) -> str:
    job, preload = _job(programs, as_module=False), _preload(programs)
    for given, wanted in cases.pairs:
        if not budget.left:
            return verdict.TIMEOUT
        limits = budget.limits(OUTPUT + 2 * len(wanted.encode(errors="replace")))
        ended = server.run(job, limits, stdin=given.encode(errors="replace"), preload=preload)
        budget.charge(ended)
        right = gold_tests.same_output(ended.printed.decode(errors="replace"), wanted)
        if (reason := _reason(ended, right)) != verdict.CORRECT:
            return reason
    return verdict.CORRECT


def _reason_of_names(
    server: ForkServer, programs: list[str], cases: CallCases | ExpressionCases, budget: _Budget
) -> str:
    if isinstance(cases, CallCases):
        test: dict[str, Any] = {"function": cases.function, "calls": cases.arguments}
    else:
        test = {"setup": cases.setup, "expressions": cases.expressions}
    wanted = json.dumps(cases.wanted, default=list, skipkeys=True)
    limits = budget.limits(OUTPUT + 2 * len(wanted))
    ended = server.run(_job(programs, as_module=True, test=test), limits, preload=_preload(programs))
    return _reason(ended, _right_values(ended.report, cases))


def _reason_of_script(servers: _Servers, programs: list[str], script: Script, budget: _Budget) -> str:
    """The tests run in a process of their own, and ask the program's for what they need of it (remote_names.py)."""
    token = secrets.token_hex(16)
    to_program, to_tests = socket.socketpair()
    limits = budget.limits(OUTPUT)
    limits_of_tests = replace(limits, asleep=_TESTS_WAIT * limits.asleep)
    with ThreadPoolExecutor(1) as beside, to_program, to_tests:
        linked = beside.submit(
            servers[0].run,
            _job(programs, as_module=True, test={"linked": True}),
            replace(limits, asleep=_PROGRAM_WAITS * limits.asleep),
            preload=_preload(programs),
            link=to_tests,
        )
        test = {"tests": script.text, "token": token}
        preload = _preload([script.text])
        ended = servers[1].run(_job([], as_module=True, test=test), limits_of_tests, preload=preload, link=to_program)
        program = linked.result()
    if ended.report == UNSENDABLE:
        return verdict.UNSUPPORTED_TEST
    reason = _reason(ended, ended.report == token.encode())
    over = program.late or program.spent + ended.spent > limits.seconds
    if over or reason != verdict.CORRECT:
        # A program that ended early is why tests end: its own reason comes first.
        own = verdict.TIMEOUT if over else _reason(program, right=True)
        return own if own != verdict.CORRECT else reason
    return reason


def _job(programs: list[str], as_module: bool, test: dict[str, Any] | None = None) -> bytes:
    """A job of confined_process.py."""
    return f"{json.dumps([programs, as_module])}\n{json.dumps(test)}\n".encode()


def _preload(programs: list[str]) -> tuple[str, ...]:
    return ("numpy",) if any(map(_NUMPY.search, programs)) else ()


def _right_values(report: bytes, cases: CallCases | ExpressionCases) -> bool:
    """Whether the report, which the program may have forged, has the wanted values."""
    try:
        returned = [gold_tests.decode_plain(item) for item in json.loads(report)]
        if len(returned) != len(cases.wanted):
            return False
        if isinstance(cases, CallCases):
            return all(map(gold_tests.equal, returned, cases.wanted))
        return all(mine == wanted for mine, wanted in zip(returned, cases.wanted, strict=True))
    except (ValueError, TypeError, KeyError, ArithmeticError, RecursionError):
        return False


def _check_confinement(server: ForkServer) -> None:
    """Raises UserError unless a program that tries to do more than compute is refused."""
    limits = Limits(seconds=10.0, asleep=10.0, memory=512 << 20, output=OUTPUT)
    ended = server.run(_job([_PROBE], as_module=False), limits, stdin=b"")
    if ended.printed != b"confined\n":
        said = (ended.complaint.strip().splitlines() or [f"it ended with {ended.code}"])[-1]
        raise UserError(
            f"reward.verifier=python_tests: this machine's kernel does not hold programs back ({said}); it needs Linux "
            "with seccomp on x86_64 or aarch64"
        )


def _reason(ended: Ended, right: bool) -> str:
    if ended.late or ended.code == _SIGXCPU:
        return verdict.TIMEOUT
    if "MemoryError" in ended.complaint.rpartition("\n  ")[2]:
        return verdict.NO_MEMORY
    return verdict.CORRECT if ended.code == 0 and right else verdict.FAILED_TEST
