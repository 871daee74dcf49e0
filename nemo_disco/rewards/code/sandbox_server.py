"""The sandbox's server, `python -P -s sandbox_server.py SETTINGS`: forks a confined process for each program.

Imports the standard library alone. The server never reads a job (code, inputs, tests), since its forks would inherit
it. The other end is sandbox.py; confined_process.py runs the job inside the confined process.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import math
import os
import resource
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import confined_process  # type: ignore[import-not-found]

del sys.path[0]

NOBODY = 65534
POLL = 0.02  # seconds between two looks at a running program
PATIENCE = 10  # a program is ended after this many times its processor time by the clock, whatever it does
THREADS = 64  # with more than these at once a program is ended
DESCRIPTORS = 64  # that a program may hold
STACK = 100 << 20  # bytes of the first thread's stack, for deep recursion; the kernel leaves 128 MB free below it
LIBRARY = 200  # descriptors from here on are Python's directories, see `open_library`
# What Python's modules read, beside Python's own directories.
SYSTEM = (
    "/lib /lib64 /usr/lib /usr/lib64 /usr/share/zoneinfo /etc/ld.so.cache /etc/localtime "
    "/dev/null /dev/zero /dev/urandom /dev/random /proc/cpuinfo /proc/meminfo"
)
_SET_PDEATHSIG, _SET_DUMPABLE, _SET_SECCOMP, _SET_NO_NEW_PRIVS = 1, 4, 22, 38
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # Landlock's calls have one number everywhere
_LANDLOCK_ALL, _READ_FILE, _READ_DIRECTORY = 0x1FFF, 0x4, 0xC  # of version 1
_O_PATH = 0x200000
_CAPABILITIES_3 = 0x20080522
_libc = ctypes.CDLL(None, use_errno=True)


class UnreadablePythonError(OSError):
    """The user that programs run as cannot read Python's own files."""


def checked(result: int, name: str) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return result


def prctl(option: int, value: int, pointer: Any = None) -> None:
    nothing = ctypes.c_ulong(0)
    checked(_libc.prctl(option, ctypes.c_ulong(value), pointer or nothing, nothing, nothing), f"prctl {option}")


def give_up_privileges() -> None:
    """Root becomes the user nobody, where there is one (a container may know root alone); no capability is kept."""
    if os.geteuid() == 0:
        with contextlib.suppress(OSError):
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
    checked(_libc.capset(struct.pack("Ii", _CAPABILITIES_3, 0), bytes(24)), "capset")


def read_only_view(paths: list[str]) -> int | None:
    """A Landlock ruleset, by its descriptor: these directories and files can be read, and nothing else.

    None where the kernel has no Landlock (before 5.13, or left out).
    """
    ruleset: int = _libc.syscall(_CREATE_RULESET, struct.pack("Q", _LANDLOCK_ALL), ctypes.c_size_t(8), 0)
    if ruleset < 0:
        return None
    for path in paths:
        try:
            descriptor = os.open(path, _O_PATH)
        except OSError:  # not on this machine
            continue
        rule = struct.pack("=Qi", _READ_DIRECTORY if os.path.isdir(path) else _READ_FILE, descriptor)
        checked(_libc.syscall(_ADD_RULE, ruleset, 1, rule, 0), "landlock_add_rule")
        os.close(descriptor)
    return ruleset


def in_a_fork(function: Callable[[], list[str]]) -> list[str]:
    """What the function returns, in a process of its own. Raises OSError where it raised."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writing, json.dumps(function()).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as file:
        said = file.read()
    os.waitpid(pid, 0)
    if not said:
        raise OSError("a forked process failed")
    found: list[str] = json.loads(said)
    return found


def open_library(paths: list[str], landlock: bool) -> None:
    """Keep Python's directories readable for a program whose user may not pass a directory above them (/root).

    Such a directory is opened here and named by its descriptor, in sys.path and in the packages that are loaded.
    Raises UnreadablePythonError where Python cannot be read all the same, or the kernel has no Landlock: by the
    descriptor a program would get at what lies above the directory.
    """

    def unreadable() -> list[str]:
        give_up_privileges()
        return [path for path in paths if not os.access(path, os.R_OK | os.X_OK)]

    def still_unreadable() -> list[str]:
        give_up_privileges()
        prctl(_SET_DUMPABLE, 1)
        return [entry for entry in sys.path if not os.access(entry, os.R_OK | os.X_OK)]

    hidden = in_a_fork(unreadable)
    for path in hidden:
        number, prefix = LIBRARY + paths.index(path), f"/proc/self/fd/{LIBRARY + paths.index(path)}"
        descriptor = os.open(path, _O_PATH | os.O_DIRECTORY)
        os.dup2(descriptor, number)
        os.close(descriptor)
        sys.path[:] = [prefix if entry == path else entry for entry in sys.path]
        for module in list(sys.modules.values()):
            package = getattr(module, "__path__", None)
            if isinstance(package, list):
                package[:] = [prefix + p.removeprefix(path) if p.startswith(path + "/") else p for p in package]
    if hidden and (not landlock or in_a_fork(still_unreadable)):
        raise UnreadablePythonError(f"the user nobody cannot read Python's own files in {hidden[0]}")


def watch(pid: int, request: dict[str, Any]) -> dict[str, Any]:
    """How the process ended, within its limits: its wait status, processor seconds, seconds asleep, and `late`.

    Time in which it was ready and the machine was busy with others counts only towards PATIENCE.
    """
    began = looked = time.monotonic()
    asleep, clock = 0.0, (~pid << 3) | 2  # the kernel's name of that process's processor clock
    while True:
        signal.sigtimedwait([signal.SIGCHLD], POLL)
        ended, status, usage = os.wait4(pid, os.WNOHANG)
        if ended:
            spent = usage.ru_utime + usage.ru_stime
            return {"status": status, "spent": spent, "asleep": asleep, "late": spent > request["seconds"]}
        now = time.monotonic()
        states = thread_states(pid)
        if states and not states.strip("S"):
            asleep += now - looked
        looked, spent = now, time.clock_gettime(clock)
        late = spent > request["seconds"] or asleep > request["asleep"] or now - began > PATIENCE * request["seconds"]
        if late or len(states) > THREADS:
            os.kill(pid, signal.SIGKILL)
            _, status, _ = os.wait4(pid, 0)
            return {"status": status, "spent": spent, "asleep": asleep, "late": late}


def thread_states(pid: int) -> str:
    """One letter a thread, as /proc says: R runs or is ready, S sleeps, ..."""
    letters = []
    with contextlib.suppress(OSError):  # it just ended
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/stat", "rb") as file:
                letters.append(file.read().rpartition(b")")[2].split()[0].decode())
    return "".join(letters)


class Server:
    """One program at a time: a request (JSON) comes on the channel, its outcome goes back."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._files = {name: renumbered(number) for name, number in settings["files"].items()}
        filter_program = bytes.fromhex(settings["filter"])
        self._instructions = ctypes.create_string_buffer(filter_program, len(filter_program))
        of_kernel = struct.pack("HxxxxxxQ", len(filter_program) // 8, ctypes.addressof(self._instructions))
        self._filter = ctypes.create_string_buffer(of_kernel, len(of_kernel))
        roots = sorted({os.path.realpath(prefix) for prefix in (sys.prefix, sys.base_prefix)})
        # Not the repository of an editable install, which may hold data.
        entries = dict.fromkeys(os.path.realpath(entry) for entry in sys.path)
        sys.path[:] = [e for e in entries if os.path.isdir(e) and any(os.path.commonpath([r, e]) == r for r in roots)]
        loader = os.environ.get("LD_LIBRARY_PATH", "").split(":")
        paths = [*sys.path, *roots, *SYSTEM.split(), *filter(None, loader)]
        self._landlock = read_only_view(paths) if settings["landlock"] else None
        open_library(list(sys.path), self._landlock is not None)
        self._null = os.open(os.devnull, os.O_RDWR)

    def serve(self, channel: socket.socket) -> None:
        """Until the other end closes the channel."""
        gc.freeze()  # keeps pages shared with the programs
        while True:
            message, links, *_ = socket.recv_fds(channel, 1 << 16, 1)
            if not message:
                return
            request = json.loads(message)
            for name in request["preload"]:
                with contextlib.suppress(ImportError):  # then the program's own import says so
                    importlib.import_module(name)
            reading, writing = os.pipe()
            pid = os.fork()
            if pid == 0:
                self._become_program(request, writing, links)
            for descriptor in (writing, *links):
                os.close(descriptor)
            with open(reading, "rb") as file:
                problem = file.read().decode()  # returns when the process is confined
            outcome = watch(pid, request)
            channel.send(json.dumps(outcome | {"problem": problem}).encode())

    def _become_program(self, request: dict[str, Any], problem: int, links: list[int]) -> NoReturn:
        """The forked process's whole life. Where it cannot be confined it says why, and runs nothing.

        links: the socket between a program and its tests, where they are run apart.
        """
        code = 1
        try:
            try:
                self._confine(request, [problem, *links])
            except BaseException as error:
                os.write(problem, (str(error) or type(error).__name__).encode())
                raise
            os.close(problem)
            code = confined_process.run(self._files["job"], self._files["report"], links[0] if links else -1)
        except BaseException:
            code = 1
        confined_process.exit_now(code)
        raise AssertionError("exit_now does not return")

    def _confine(self, request: dict[str, Any], kept: list[int]) -> None:
        """Take the limits on, and keep those descriptors open. Raises OSError where the kernel refuses a limit."""
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
        for number, name in enumerate(("stdin", "stdout", "stderr")):
            os.dup2(self._null if name in request["closed"] else self._files[name], number)
        for number in (0, 1, 2, self._files["job"], self._files["report"]):
            os.lseek(number, 0, os.SEEK_SET)
        with open("/proc/self/statm", "rb") as file:
            own = int(file.read().split()[0]) * resource.getpagesize()
        limit(resource.RLIMIT_AS, own + request["memory"])
        limit(resource.RLIMIT_CPU, math.ceil(request["seconds"]) + 1)
        limit(resource.RLIMIT_FSIZE, request["output"])
        limit(resource.RLIMIT_CORE, 0)
        limit(resource.RLIMIT_STACK, STACK, lower=False)
        give_up_privileges()
        prctl(_SET_PDEATHSIG, signal.SIGKILL)
        prctl(_SET_NO_NEW_PRIVS, 1)
        if self._landlock is not None:
            checked(_libc.syscall(_RESTRICT_SELF, self._landlock, 0), "landlock_restrict_self")
            prctl(_SET_DUMPABLE, 1)  # for its own /proc/self/fd; under Landlock no other program can read its memory
        last = 2
        for number in sorted({self._files["job"], self._files["report"], *kept, LIBRARY}):
            os.closerange(last + 1, number)
            last = number
        limit(resource.RLIMIT_NOFILE, DESCRIPTORS)
        prctl(_SET_SECCOMP, 2, self._filter)


def limit(kind: int, value: int, lower: bool = True) -> None:
    """lower: the hard limit too."""
    _, hard = resource.getrlimit(kind)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value if lower else hard))


def renumbered(descriptor: int) -> int:
    """The same file under the lowest free number: those from LIBRARY on have another use."""
    lowest = os.dup(descriptor)
    os.close(descriptor)
    return lowest


def main() -> None:
    settings = json.loads(sys.argv[1])
    channel = socket.socket(fileno=renumbered(settings["channel"]))
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    sys.dont_write_bytecode = True
    try:
        prctl(_SET_DUMPABLE, 0)
        server = Server(settings)
    except Exception as error:
        unreadable = isinstance(error, UnreadablePythonError)
        channel.send(json.dumps({"problem": str(error), "unreadable": unreadable}).encode())
        return
    channel.send(json.dumps({"problem": ""}).encode())
    with contextlib.suppress(OSError):  # the other end is gone
        server.serve(channel)


if __name__ == "__main__":
    main()
