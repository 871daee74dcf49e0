"""The math grader's process: imports sympy and forks up to N children, each of which judges one answer at a time.

`python -m nemo_disco.rewards.math.algebra_process N` reads lines of JSON (id, answer, golds, timeout) and writes lines
of JSON (id, reason). Only the children read answers, so the parent never hangs: it kills a child that has used up its
processor time and forks another in milliseconds. It has one thread and ends when its input is closed.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import select
import signal
import socket
import sys
import time
from collections import deque
from dataclasses import dataclass
from typing import Any, NoReturn

from nemo_disco.rewards import verdict
from nemo_disco.rewards.math import expressions, symbolic
from nemo_disco.runtime.host import set_limit

MEMORY_BYTES = 4 << 30  # address space of a child
READ_BYTES = 1 << 16
PATIENCE = 60  # a child may take this many times its limit of wall-clock time, for it may wait for a processor
CHECK_S = 0.02  # least time between two checks of a child's processor time, which the kernel counts in hundredths
# Common constructs: the parser builds its tables as it meets them, and the children inherit those built here.
WARM_UP = (
    r"\frac{\sqrt{3}}{2}",
    r"(-\infty,3]\cup[2,5)",
    r"x^2+3x-1",
    r"y=2x+3",
    r"1,2",
    r"\begin{pmatrix}1&2\\3&4\end{pmatrix}",
)
NEVER = float("inf")
TICKS = os.sysconf("SC_CLK_TCK")  # per second, of the processor times in /proc


@dataclass
class Child:
    """One forked child as the parent sees it. job: id of the answer that it judges, None when idle.

    limit: the child's processor seconds at which the answer's time is up. deadline: monotonic time at which it is up
    even if the child computes nothing. check: monotonic time of the next check.
    """

    pid: int
    channel: socket.socket
    job: int | None = None
    limit: float = NEVER
    deadline: float = NEVER
    check: float = NEVER
    reply: bytes = b""

    def start(self, job: int, timeout: float) -> None:
        now = time.monotonic()
        self.job, self.limit = job, processor_time(self.pid) + timeout
        self.deadline, self.check = now + PATIENCE * timeout, now + timeout

    def reset(self) -> None:
        self.job, self.limit, self.deadline, self.check, self.reply = None, NEVER, NEVER, NEVER, b""

    def is_late(self, now: float) -> bool:
        """True if the answer's time is up; else set the next check to when the child's thread can have used it up."""
        if now < self.check:
            return False
        remaining = self.limit - processor_time(self.pid)
        self.check = now + max(remaining, CHECK_S)
        return remaining <= 0 or now >= self.deadline


class ChildPool:
    """Assigns jobs in order to idle children; a job's time is the processor time that its child uses from then on."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.children: list[Child] = []
        self.jobs: deque[dict[str, Any]] = deque()
        self.partial = b""

    def run(self) -> None:
        """Serve the trainer until it closes its end or dies."""
        while True:
            self._assign()
            wait = min((child.check for child in self.children), default=NEVER) - time.monotonic()
            sources: list[Any] = [sys.stdin.fileno(), *(child.channel for child in self.children)]
            ready, _, _ = select.select(sources, [], [], None if wait == NEVER else max(0.0, wait))
            if sys.stdin.fileno() in ready and not self._read_jobs():
                return
            for child in [c for c in self.children if c.channel in ready]:
                self._read_reply(child)
            for child in [c for c in self.children if c.is_late(time.monotonic())]:
                self._report(child, verdict.TIMEOUT)
                self._kill(child)

    def close(self) -> None:
        for child in list(self.children):
            self._kill(child)

    def _read_jobs(self) -> bool:
        """Queue the jobs that the trainer sent; False once it has closed its end or died."""
        data = os.read(sys.stdin.fileno(), READ_BYTES)
        *lines, self.partial = (self.partial + data).split(b"\n")
        self.jobs.extend(json.loads(line) for line in lines)
        return bool(data)

    def _assign(self) -> None:
        while self.jobs:
            child = next((c for c in self.children if c.job is None), None)
            if child is None and len(self.children) == self.size:
                return
            child = child or self._fork()
            job = self.jobs.popleft()
            child.start(job["id"], job["timeout"])
            try:
                child.channel.sendall(json.dumps(job).encode() + b"\n")
            except OSError:  # it died while idle
                self._report(child, verdict.DIED)
                self._kill(child)

    def _read_reply(self, child: Child) -> None:
        try:
            data = child.channel.recv(READ_BYTES)
        except ConnectionResetError:
            data = b""
        child.reply += data
        if not data:  # it died: of SIGXCPU if its time ran out before this process checked it
            self._report(child, verdict.TIMEOUT if processor_time(child.pid) >= child.limit else verdict.DIED)
            self._kill(child)
        elif child.reply.endswith(b"\n"):
            self._report(child, child.reply.decode().strip())

    def _report(self, child: Child, reason: str) -> None:
        """Send the child's verdict, if it has a job, to the trainer; the child is idle from then on."""
        if child.job is not None:
            send({"id": child.job, "reason": reason})
        child.reset()

    def _kill(self, child: Child) -> None:
        os.kill(child.pid, signal.SIGKILL)
        os.waitpid(child.pid, 0)
        child.channel.close()
        self.children.remove(child)

    def _fork(self) -> Child:
        """Start a child and return the parent's side of it."""
        parent_end, child_end = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            parent_end.close()
            for sibling in self.children:  # else a sibling's channel would stay open when the parent dies
                sibling.channel.close()
            run_child(child_end)
        child_end.close()
        child = Child(pid, parent_end)
        self.children.append(child)
        return child


def run_child(channel: socket.socket) -> NoReturn:
    """Judge one answer after another until the parent ends or kills it."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    for kind, value in ((resource.RLIMIT_AS, MEMORY_BYTES), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        set_limit(kind, value)
    sys.dont_write_bytecode = True
    sys.addaudithook(refuse_effects)
    try:
        for line in channel.makefile("rb"):
            job = json.loads(line)
            limit_cpu(job["timeout"])
            channel.sendall(symbolic.judge(job["answer"], job["golds"]).encode() + b"\n")
    finally:
        os._exit(0)


def processor_time(pid: int) -> float:
    """Seconds of processor time that a process has used; 0 if there is no such process."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            fields = stat.read().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / TICKS


def limit_cpu(timeout: float) -> None:
    """Let the kernel end this child 1 to 2 s after its answer's processor time, in case the parent was killed."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    set_limit(resource.RLIMIT_CPU, int(usage.ru_utime + usage.ru_stime + timeout) + 2)


def refuse_effects(event: str, arguments: tuple[Any, ...]) -> None:
    """Audit hook of a child, a second line of defence: no new process, no connection and no file to write."""
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    effect = event.startswith(("os.", "subprocess.", "socket.", "shutil.", "ctypes.", "pty."))
    if writes or (effect and event not in ("os.listdir", "os.scandir")):  # these two are the import system's
        raise PermissionError(f"a process of the math grader may not do {event}")


def send(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the trainer, which ends this process
    expressions.restrict_string_parser()
    for latex in WARM_UP:
        assert symbolic.judge(latex, [latex]) == verdict.CORRECT, latex
    symbolic.judge("x^2-1", ["(x-1)(x+1)+y"])  # unequal, so that simplify runs too
    gc.collect()
    gc.freeze()  # keeps memory pages shared with the children
    pool = ChildPool(int(sys.argv[1]))
    send({"ready": os.getpid()})
    try:
        pool.run()
    finally:
        pool.close()
    os._exit(0)  # nothing to clean up, and sympy's own exit is slow


if __name__ == "__main__":
    main()
