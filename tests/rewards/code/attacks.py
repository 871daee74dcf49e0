"""A program that attempts everything that the sandbox must refuse, and prints the result of each attempt.

Also a script: `attacks.py landlock` or `attacks.py none` runs that program in the sandbox as the present user, with
Landlock or without, and prints the outcome as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyseccomp

from nemo_disco.rewards.code.sandbox import Limits, Outcome, Sandbox

LIMITS = Limits(cpu_seconds=10.0, sleep_seconds=10.0, memory_bytes=512 << 20, output_bytes=1 << 20)
# Calls that this libseccomp may be too old to name; their numbers are the same on all architectures.
NEWER = {
    "fchmodat2": 452, "setxattrat": 463, "removexattrat": 466, "file_setattr": 469, "openat2": 437, "clone3": 435,
    "pidfd_open": 434, "pidfd_getfd": 438, "pidfd_send_signal": 424, "io_uring_setup": 425, "open_tree": 428,
    "move_mount": 429, "fsopen": 430, "mount_setattr": 442, "memfd_secret": 447, "process_madvise": 440,
}  # fmt: skip

# Arguments by call. {path}: a file of this user; {fd}: its open descriptor; {other}: an unused path; {pid}: the grader.
CALLS = {
    "chmod": "{path}, 0o777", "fchmod": "{fd}, 0o777", "fchmodat": "AT, {path}, 0o777, 0",
    "fchmodat2": "AT, {path}, 0o777, 0", "chown": "{path}, -1, -1", "fchown": "{fd}, -1, -1",
    "lchown": "{path}, -1, -1", "fchownat": "AT, {path}, -1, -1, 0", "utime": "{path}, 0", "utimes": "{path}, 0",
    "futimesat": "AT, {path}, 0", "utimensat": "AT, {path}, 0, 0", "setxattr": "{path}, b'user.x', b'y', 1, 0",
    "lsetxattr": "{path}, b'user.x', b'y', 1, 0", "fsetxattr": "{fd}, b'user.x', b'y', 1, 0",
    "removexattr": "{path}, b'user.kept'", "lremovexattr": "{path}, b'user.kept'",
    "fremovexattr": "{fd}, b'user.kept'", "setxattrat": "AT, {path}, 0, b'user.x', bytes(16), 16",
    "removexattrat": "AT, {path}, 0, b'user.kept'", "file_setattr": "AT, {path}, bytes(64), 24, 0",
    "truncate": "{path}, 0", "ftruncate": "1, 0", "creat": "{other}, 0o600", "open": "{path}, 1",
    "openat": "AT, {path}, 2", "openat2": "AT, {path}, bytes(24), 24", "rename": "{path}, {other}",
    "renameat": "AT, {path}, AT, {other}", "renameat2": "AT, {path}, AT, {other}, 0", "link": "{path}, {other}",
    "linkat": "AT, {path}, AT, {other}, 0", "symlink": "{path}, {other}", "symlinkat": "{path}, AT, {other}",
    "unlink": "{path}", "unlinkat": "AT, {path}, 0", "mkdir": "{other}, 0o700", "mkdirat": "AT, {other}, 0o700",
    "rmdir": "{other}", "mknod": "{other}, 0o10600, 0", "mknodat": "AT, {other}, 0o10600, 0",
    "fallocate": "1, 0, 0, 4096", "memfd_create": "b'x', 0", "memfd_secret": "0",
    "name_to_handle_at": "AT, {path}, HANDLE, ctypes.byref(MOUNT), 0", "open_by_handle_at": "AT, HANDLE, 0",
    "flock": "{fd}, 2", "inotify_init1": "0", "fanotify_init": "0, 0", "chroot": "b'/'", "chdir": "b'/tmp'",
    "mount": "b'none', b'/mnt', b'tmpfs', 0, 0", "umount2": "b'/mnt', 0", "pivot_root": "b'/', b'/'",
    "swapon": "{path}, 0", "fsopen": "b'tmpfs', 0", "open_tree": "AT, b'/', 1",
    "move_mount": "AT, b'/', AT, b'/mnt', 0", "mount_setattr": "AT, b'/', 0, bytes(32), 32", "acct": "0",
    "quotactl": "0, 0, 0, 0", "sync": "", "kill": "{pid}, 0", "tkill": "{pid}, 0", "tgkill": "{pid}, {pid}, 0",
    "rt_sigqueueinfo": "{pid}, 0, SIGINFO", "rt_tgsigqueueinfo": "{pid}, {pid}, 0, SIGINFO", "pidfd_open": "{pid}, 0",
    "pidfd_getfd": "0, 0, 0", "pidfd_send_signal": "0, 0, 0, 0", "ptrace": "0x4206, {pid}, 0, 0",
    "process_vm_readv": "{pid}, VECTOR, 1, VECTOR, 1, 0", "process_vm_writev": "{pid}, VECTOR, 1, VECTOR, 1, 0",
    "process_madvise": "0, VECTOR, 1, 4, 0", "kcmp": "{pid}, {pid}, 0, 0, 0", "setpriority": "0, {pid}, 5",
    "sched_setaffinity": "{pid}, 8, bytes([255] * 8)", "sched_setscheduler": "{pid}, 3, bytes(4)",
    "prlimit64": "{pid}, 7, 0, bytes(16)", "ioprio_set": "1, {pid}, 0x4007",
    "migrate_pages": "{pid}, 8, bytes(8), bytes(8)", "move_pages": "{pid}, 0, 0, 0, 0, 0", "fork": "", "vfork": "",
    "clone": "17, 0, 0, 0, 0", "clone3": "bytes([0] * 88), 88", "execve": "b'/bin/true', 0, 0",
    "execveat": "AT, b'/bin/true', 0, 0, 0", "unshare": "0x10000000", "setns": "0, 0", "setsid": "",
    "setpgid": "0, 0", "prctl": "4, 1, 0, 0, 0", "personality": "0x0040000", "seccomp": "2, 0, 0", "setuid": "0",
    "setgid": "0", "setresuid": "0, 0, 0", "setgroups": "0, 0", "capset": "bytes(8), bytes(24)",
    "mq_open": "b'nemo', 0o102, 0o600, 0", "mq_unlink": "b'nemo'", "shmget": "0, 4096, 0o1600",
    "semget": "0, 1, 0o1600", "msgget": "0, 0o1600", "sethostname": "HOST, len(HOST)", "setdomainname": "b'x', 1",
    "settimeofday": "0, 0", "clock_settime": "0, NOW", "adjtimex": "bytes(208)", "clock_adjtime": "0, bytes(208)",
    "io_uring_setup": "1, bytes(120)", "bpf": "0, bytes(64), 64", "perf_event_open": "bytes(128), 0, -1, -1, 0",
    "userfaultfd": "1", "keyctl": "0, -3, 0", "add_key": "b'user', b'x', b'y', 1, -3",
    "request_key": "b'user', b'x', 0, -3", "syslog": "10, 0, 0", "iopl": "0", "ioperm": "0, 1, 0",
    "reboot": "0, 0, 0, 0", "kexec_load": "0, 0, 0, 0", "init_module": "bytes(8), 8, b''",
    "delete_module": "b'none', 0", "timer_create": "0, 0, bytes(8)", "mlockall": "1", "socket": "2, 1, 0",
    "connect": "0, bytes(16), 16", "bind": "0, bytes(16), 16", "listen": "0, 1", "sendmsg": "0, bytes(56), 0",
    "socketpair": "1, 2, 0, ctypes.byref(PAIR)", "sendfile": "1, {fd}, 0, 1", "splice": "0, 0, 1, 0, 1, 0",
    "vhangup": "",
}  # fmt: skip

PROGRAM = """
import ctypes, errno, fcntl, json, os, struct, time
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
AT, HOST, NOW = -100, os.uname().nodename.encode(), struct.pack("qq", int(time.time()), 0)
HANDLE = ctypes.create_string_buffer(struct.pack("Ii", 128, 0) + bytes(128))
MOUNT, PAIR = ctypes.c_int(), (ctypes.c_int * 2)()
SIGINFO, VECTOR = bytes(128), bytes(16)
results = {{}}
def call(number, *arguments):
    ctypes.set_errno(0)
    # Numbers as 64 bits, as the kernel takes them.
    arguments = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    result = libc.syscall(ctypes.c_long(number), *arguments)
    return "got through" if result >= 0 else errno.errorcode.get(ctypes.get_errno(), "?")
def attempt(name, function):
    try:
        function()
        results[name] = "got through"
    except OSError as error:
        results[name] = errno.errorcode.get(error.errno, "?")
    except Exception as error:
        results[name] = type(error).__name__
parent, pid = os.getppid(), {pid}
def memory(process):
    with open(f"/proc/{{process}}/maps") as maps, open(f"/proc/{{process}}/mem", "rb", 0) as file:
        file.seek(int(next(maps).split("-")[0], 16))
        file.read(16)
for process in dict.fromkeys((parent, pid)):
    attempt(f"memory of {{process}}", lambda: memory(process))
    for name in ("environ", "auxv", "syscall", "stack"):
        attempt(f"{{name}} of {{process}}", lambda: open(f"/proc/{{process}}/{{name}}", "rb").read())
        attempt(f"{{name}} of {{process}} by self", lambda: open(f"/proc/self/../{{process}}/{{name}}", "rb").read())
    attempt(f"descriptors of {{process}}", lambda: os.listdir(f"/proc/{{process}}/fd"))
    attempt(f"root of {{process}}", lambda: os.listdir(f"/proc/{{process}}/root"))
    attempt(f"cwd of {{process}}", lambda: os.listdir(f"/proc/{{process}}/cwd"))
    attempt(f"maps of {{process}}", lambda: open(f"/proc/{{process}}/maps").read())
reading, writing = os.pipe()
attempt("F_SETOWN", lambda: fcntl.fcntl(reading, fcntl.F_SETOWN, pid))
attempt("F_SETOWN_EX", lambda: fcntl.fcntl(reading, 15, struct.pack("ii", 1, pid)))
attempt("F_SETSIG", lambda: fcntl.fcntl(reading, 10, 9))
attempt("O_ASYNC", lambda: fcntl.fcntl(reading, fcntl.F_SETFL, os.O_ASYNC if hasattr(os, "O_ASYNC") else 0x2000))
attempt("O_APPEND", lambda: fcntl.fcntl(1, fcntl.F_SETFL, fcntl.fcntl(1, fcntl.F_GETFL) | os.O_APPEND))
attempt("FIOASYNC", lambda: fcntl.ioctl(reading, 0x5452, struct.pack("i", 1)))
attempt("FIOSETOWN", lambda: fcntl.ioctl(reading, 0x8901, struct.pack("i", pid)))
attempt("TIOCSTI", lambda: fcntl.ioctl(0, 0x5412, b"x"))
pair = __import__("socket").socketpair()
attempt("SO_PEERCRED", lambda: pair[0].getsockopt(1, 17, 12))
attempt("SO_PEERPIDFD", lambda: pair[0].getsockopt(1, 77))
attempt("F_NOTIFY", lambda: fcntl.fcntl(os.open("/usr/lib", os.O_RDONLY), 1026, 0x80000004))
attempt("F_SETLEASE", lambda: fcntl.fcntl(reading, 1024, 0))
os.write(writing, b"x")
fd = os.dup(0)
try:
    fd = os.open({path!r}, os.O_RDONLY)
except OSError:
    pass
for name in ("/tmp/x", "/dev/shm/x", "x", {other!r}, "/dev/null"):
    attempt(f"write {{name}}", lambda: open(name, "w"))
attempt("O_TMPFILE", lambda: os.open("/tmp", os.O_TMPFILE | os.O_RDWR))
attempt("raise a limit", lambda: __import__("resource").setrlimit(7, (1024, 1024)))
{calls}
print(json.dumps(results))
"""


def build_program(path: Path, victim: int) -> str:
    """Return the program's source. path: an existing file to attack; victim: a process to attack, as is its parent."""
    places = {"path": repr(os.fsencode(path)), "other": repr(os.fsencode(path) + b".new"), "fd": "fd", "pid": "pid"}
    lines = []
    for name, arguments in CALLS.items():
        number = pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name)
        number = NEWER.get(name, -1) if number < 0 else number
        if number >= 0:  # a negative number: this architecture does not have the call
            arguments = arguments.format(**places)
            lines.append(f"results[{name!r}] = call({', '.join(filter(None, [str(number), arguments]))})")
    fields = {"path": str(path), "other": f"{path}.new", "pid": victim, "calls": "\n".join(lines)}
    return PROGRAM.format(**fields)


def run(sandbox: Sandbox, code: str, stdin: bytes = b"") -> Outcome:
    return sandbox.run(json.dumps([[code], False]).encode() + b"\n", LIMITS, stdin=stdin)


def attack(landlock: bool) -> dict[str, Any]:
    """Run the program in a sandbox. In the outcome, `results` has each attempt's error by its name, `harm` is True if
    the file or its folder changed, and `signals` lists the signals that this process received."""
    signals: list[int] = []
    numbers = (signal.SIGIO, signal.SIGUSR1, signal.SIGTERM)
    handlers = {number: signal.signal(number, lambda number, _: signals.append(number)) for number in numbers}
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        path = Path(folder) / "victim"
        path.write_text("kept")
        path.chmod(0o666)
        before = path.stat()
        sandbox = Sandbox(landlock=landlock)
        try:
            outcome = run(sandbox, build_program(path, os.getpid()))
        finally:
            sandbox.close()
        now = path.stat()
        unchanged = (now.st_mode, now.st_uid, now.st_gid, now.st_mtime_ns, now.st_size, now.st_ctime_ns) == (
            before.st_mode, before.st_uid, before.st_gid, before.st_mtime_ns, before.st_size, before.st_ctime_ns
        )  # fmt: skip
        harm = not unchanged or os.listdir(folder) != ["victim"] or os.listxattr(path) != []
    for number, handler in handlers.items():
        signal.signal(number, handler)
    results = json.loads(outcome.stdout) if outcome.exit_code == 0 else {}
    return {
        "results": results,
        "harm": harm,
        "signals": signals,
        "exit_code": outcome.exit_code,
        "stderr": outcome.stderr,
    }


if __name__ == "__main__":
    print(json.dumps(attack(sys.argv[1] == "landlock")))
