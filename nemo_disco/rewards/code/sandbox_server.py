"""The sandbox's server process, `python -P -s sandbox_server.py SETTINGS`: forks a confined process for each job.

sandbox.py, in the trainer's process, starts it and sends requests; confined_process.py runs the job in the forked one.
Imports the standard library alone. It never reads a job (code, inputs, tests), since later forks would inherit it.
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
POLL_S = 0.02  # between two checks of a running program
PATIENCE = 10  # a program is killed after this many times its processor limit of wall-clock time, whatever it does
MAX_THREADS = 64  # a program with more at once is killed
MAX_DESCRIPTORS = 64  # that a program may have open
STACK_BYTES = 100 << 20  # of the first thread, for deep recursion; the kernel leaves 128 MB free below it
FIRST_LIBRARY = 200  # descriptors from here on are Python's directories, see `keep_python_readable`
# What Python's modules read besides Python's own directories.
SYSTEM_PATHS = (
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


def check_call(result: int, name: str) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return result


def prctl(option: int, value: int, pointer: Any = None) -> None:
    nothing = ctypes.c_ulong(0)
    check_call(_libc.prctl(option, ctypes.c_ulong(value), pointer or nothing, nothing, nothing), f"prctl {option}")


def give_up_privileges() -> None:
    """Become the user nobody if root (unless a container has no other user), and drop all capabilities."""
    if os.geteuid() == 0:
        with contextlib.suppress(OSError):
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
    check_call(_libc.capset(struct.pack("Ii", _CAPABILITIES_3, 0), bytes(24)), "capset")


def build_landlock_ruleset(paths: list[str]) -> int | None:
    """Descriptor of a Landlock ruleset under which these directories and files can be read, and nothing else.

    None if the kernel has no Landlock (older than 5.13, or built without).
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
        check_call(_libc.syscall(_ADD_RULE, ruleset, 1, rule, 0), "landlock_add_rule")
        os.close(descriptor)
    return ruleset


def run_forked(function: Callable[[], list[str]]) -> list[str]:
    """Call the function in a forked process and return its result. Raises OSError if it raised."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writing, json.dumps(function()).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as file:
        data = file.read()
    os.waitpid(pid, 0)
    if not data:
        raise OSError("a forked process failed")
    result: list[str] = json.loads(data)
    return result


def keep_python_readable(paths: list[str], landlock: bool) -> None:
    """Keep Python's directories readable for a program whose user may not enter a directory above them (/root).

    Such a directory is opened here, and its path through that descriptor replaces it in sys.path and in the packages
    that are loaded. Raises UnreadablePythonError if Python still cannot be read, or if the kernel has no Landlock:
    without it, a program could climb from the descriptor to the directories above.
    """

    def unreadable() -> list[str]:
        give_up_privileges()
        return [path for path in paths if not os.access(path, os.R_OK | os.X_OK)]

    def still_unreadable() -> list[str]:
        give_up_privileges()
        prctl(_SET_DUMPABLE, 1)
        return [entry for entry in sys.path if not os.access(entry, os.R_OK | os.X_OK)]

    hidden = run_forked(unreadable)
    for path in hidden:
        number = FIRST_LIBRARY + paths.index(path)
        prefix = f"/proc/self/fd/{number}"
        descriptor = os.open(path, _O_PATH | os.O_DIRECTORY)
        os.dup2(descriptor, number)
        os.close(descriptor)
        sys.path[:] = [prefix if entry == path else entry for entry in sys.path]
        for module in list(sys.modules.values()):
            package = getattr(module, "__path__", None)
            if isinstance(package, list):
                package[:] = [prefix + p.removeprefix(path) if p.startswith(path + "/") else p for p in package]
    if hidden and (not landlock or run_forked(still_unreadable)):
        raise UnreadablePythonError(f"the user nobody cannot read Python's own files in {hidden[0]}")


def watch(pid: int, request: dict[str, Any]) -> dict[str, Any]:
    """Wait for the process, kill it if it exceeds a limit, and return its status, seconds used, and if it timed out.

    Time in which it was ready to run but got no processor counts only towards PATIENCE.
    """
    cpu_limit = request["cpu_seconds"]
    start = last_check = time.monotonic()
    sleep_seconds, clock = 0.0, (~pid << 3) | 2  # the kernel's id of that process's processor clock
    while True:
        signal.sigtimedwait([signal.SIGCHLD], POLL_S)
        ended_pid, status, usage = os.wait4(pid, os.WNOHANG)
        if ended_pid:
            cpu_seconds = usage.ru_utime + usage.ru_stime
            timed_out = cpu_seconds > cpu_limit
            break
        now = time.monotonic()
        states = thread_states(pid)
        if states and not states.strip("S"):
            sleep_seconds += now - last_check
        last_check, cpu_seconds = now, time.clock_gettime(clock)
        slept_too_long = sleep_seconds > request["sleep_seconds"]
        timed_out = cpu_seconds > cpu_limit or slept_too_long or now - start > PATIENCE * cpu_limit
        if timed_out or len(states) > MAX_THREADS:
            os.kill(pid, signal.SIGKILL)
            _, status, _ = os.wait4(pid, 0)
            break
    return {"status": status, "cpu_seconds": cpu_seconds, "sleep_seconds": sleep_seconds, "timed_out": timed_out}


def thread_states(pid: int) -> str:
    """One letter per thread, from /proc: R runs or is ready to, S sleeps, ..."""
    letters = []
    with contextlib.suppress(OSError):  # it just ended
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/stat", "rb") as file:
                letters.append(file.read().rpartition(b")")[2].split()[0].decode())
    return "".join(letters)


class SandboxServer:
    """Serves one request (JSON) at a time from the channel: runs its job in a fork and sends the outcome back."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._files = {name: renumber(number) for name, number in settings["files"].items()}
        instructions = bytes.fromhex(settings["filter"])
        self._instructions = ctypes.create_string_buffer(instructions, len(instructions))
        header = struct.pack("HxxxxxxQ", len(instructions) // 8, ctypes.addressof(self._instructions))
        self._filter = ctypes.create_string_buffer(header, len(header))
        roots = sorted({os.path.realpath(prefix) for prefix in (sys.prefix, sys.base_prefix)})
        # Python's own directories alone: the repository of an editable install may hold data.
        entries = dict.fromkeys(os.path.realpath(entry) for entry in sys.path)
        sys.path[:] = [e for e in entries if os.path.isdir(e) and any(os.path.commonpath([r, e]) == r for r in roots)]
        loader = os.environ.get("LD_LIBRARY_PATH", "").split(":")
        paths = [*sys.path, *roots, *SYSTEM_PATHS.split(), *filter(None, loader)]
        self._landlock = build_landlock_ruleset(paths) if settings["landlock"] else None
        keep_python_readable(list(sys.path), self._landlock is not None)
        self._null = os.open(os.devnull, os.O_RDWR)

    def serve(self, channel: socket.socket) -> None:
        """Serve requests until the trainer closes the channel."""
        gc.freeze()  # keeps pages shared with the programs
        while True:
            message, links, *_ = socket.recv_fds(channel, 1 << 16, 1)
            if not message:
                return
            request = json.loads(message)
            for name in request["preload"]:
                with contextlib.suppress(ImportError):  # then the program's own import raises it
                    importlib.import_module(name)
            reading, writing = os.pipe()
            pid = os.fork()
            if pid == 0:
                self._become_program(request, writing, links)
            for descriptor in (writing, *links):
                os.close(descriptor)
            with open(reading, "rb") as file:
                problem = file.read().decode()  # "" once the process is confined
            outcome = watch(pid, request)
            channel.send(json.dumps(outcome | {"problem": problem}).encode())

    def _become_program(self, request: dict[str, Any], problem: int, links: list[int]) -> NoReturn:
        """Confine this forked process, run the job and exit. If it cannot be confined, report why and run nothing.

        problem: descriptor to report to. links: at most one, the socket between a program and its tests.
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
        confined_process.exit_as_python(code)
        raise AssertionError("exit_as_python does not return")

    def _confine(self, request: dict[str, Any], keep_open: list[int]) -> None:
        """Confine this process and close all but its own descriptors. Raises OSError if the kernel refuses a step."""
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
        for number, name in enumerate(("stdin", "stdout", "stderr")):
            os.dup2(self._null if name in request["closed"] else self._files[name], number)
        for number in (0, 1, 2, self._files["job"], self._files["report"]):
            os.lseek(number, 0, os.SEEK_SET)
        with open("/proc/self/statm", "rb") as file:
            own = int(file.read().split()[0]) * resource.getpagesize()
        set_limit(resource.RLIMIT_AS, own + request["memory_bytes"])
        set_limit(resource.RLIMIT_CPU, math.ceil(request["cpu_seconds"]) + 1)
        set_limit(resource.RLIMIT_FSIZE, request["output_bytes"])
        set_limit(resource.RLIMIT_CORE, 0)
        set_limit(resource.RLIMIT_STACK, STACK_BYTES, lower_hard=False)
        give_up_privileges()
        prctl(_SET_PDEATHSIG, signal.SIGKILL)
        prctl(_SET_NO_NEW_PRIVS, 1)
        if self._landlock is not None:
            check_call(_libc.syscall(_RESTRICT_SELF, self._landlock, 0), "landlock_restrict_self")
            prctl(_SET_DUMPABLE, 1)  # opens its own /proc/self/fd; under Landlock no other program reads its memory
        last = 2
        for number in sorted({self._files["job"], self._files["report"], *keep_open, FIRST_LIBRARY}):
            os.closerange(last + 1, number)
            last = number
        set_limit(resource.RLIMIT_NOFILE, MAX_DESCRIPTORS)
        prctl(_SET_SECCOMP, 2, self._filter)


def set_limit(kind: int, value: int, lower_hard: bool = True) -> None:
    """Set a resource's soft limit, at most its hard limit, and lower the hard limit to it too if `lower_hard`."""
    _, hard = resource.getrlimit(kind)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value if lower_hard else hard))


def renumber(descriptor: int) -> int:
    """Move the descriptor to the lowest free number, away from those at FIRST_LIBRARY and above."""
    lowest = os.dup(descriptor)
    os.close(descriptor)
    return lowest


def main() -> None:
    settings = json.loads(sys.argv[1])
    channel = socket.socket(fileno=renumber(settings["channel"]))
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    sys.dont_write_bytecode = True
    try:
        prctl(_SET_DUMPABLE, 0)
        server = SandboxServer(settings)
    except Exception as error:
        unreadable = isinstance(error, UnreadablePythonError)
        channel.send(json.dumps({"problem": str(error), "unreadable": unreadable}).encode())
        return
    channel.send(json.dumps({"problem": ""}).encode())
    with contextlib.suppress(OSError):  # the trainer's process is gone
        server.serve(channel)


if __name__ == "__main__":
    main()
