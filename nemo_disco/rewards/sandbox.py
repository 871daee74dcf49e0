"""The sandboxed process, `python -I -S sandbox.py`: runs one program with limits that the kernel holds, then ends.

A job is JSON on stdin. Imports the standard library alone, and nothing of this package. What it promises and what it
does not stands in code_tests.py.
"""

from __future__ import annotations

import ctypes
import io
import json
import os
import platform
import resource
import struct
import sys
from typing import Any

# What a tested program may not ask of the kernel (x86_64, aarch64); None: that machine has no such call.
DENIED: dict[str, tuple[int | None, int | None]] = {
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281),
    "socket": (41, 198), "socketpair": (53, 199), "io_uring_setup": (425, 425), "openat2": (437, 437),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "pidfd_send_signal": (424, 424),
    "rt_sigqueueinfo": (129, 138), "prlimit64": (302, 261), "setrlimit": (160, 164), "setpriority": (141, 140),
    "creat": (85, None), "truncate": (76, 45), "unlink": (87, None), "unlinkat": (263, 35), "rmdir": (84, None),
    "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276), "mkdir": (83, None), "mkdirat": (258, 34),
    "link": (86, None), "linkat": (265, 37), "symlink": (88, None), "symlinkat": (266, 36), "mknod": (133, None),
    "mknodat": (259, 33), "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "chown": (92, None),
    "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54), "setxattr": (188, 5), "utimensat": (280, 88),
    "mount": (165, 40), "umount2": (166, 39), "chroot": (161, 51), "pivot_root": (155, 41), "setns": (308, 268),
    "unshare": (272, 97), "bpf": (321, 280), "perf_event_open": (298, 241), "keyctl": (250, 219), "add_key": (248, 217),
    "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190), "memfd_create": (319, 279), "reboot": (169, 142),
}  # fmt: skip
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_CLONE, _CLONE3, _OPENAT, _OPEN = (56, 220), (435, 435), (257, 56), (2, None)
_CLONE_THREAD, _WRITES = 0x10000, os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_ALLOW, _KILL, _EPERM, _ENOSYS = 0x7FFF0000, 0x80000000, 0x50001, 0x50026
_LOAD, _EQUAL, _ABOVE, _BITS, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06


def filter_program(machine: str) -> bytes:
    """The seccomp filter: classic BPF over (call number, architecture, arguments). Raises OSError elsewhere."""
    if machine not in _ARCHITECTURES:
        raise OSError(f"no seccomp table for {machine}")
    column, architecture = _ARCHITECTURES[machine]
    code: list[tuple[int, int, int, int]] = [
        (_LOAD, 0, 0, 4), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0), (_ABOVE, 0, 1, 0x40000000), (_RETURN, 0, 0, _KILL),  # the x32 numbering
    ]  # fmt: skip
    for number in (numbers[column] for numbers in DENIED.values()):
        if number is not None:
            code += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _EPERM)]
    code += [(_EQUAL, 0, 1, _CLONE3[column]), (_RETURN, 0, 0, _ENOSYS)]  # the C library then asks for clone
    for call, argument, bits, refused in (
        (_CLONE[column], 0, _CLONE_THREAD, False),
        (_OPENAT[column], 2, _WRITES, True),
        (_OPEN[column], 1, _WRITES, True),
    ):
        if call is not None:
            yes, no = (_EPERM, _ALLOW) if refused else (_ALLOW, _EPERM)
            code += [(_EQUAL, 0, 4, call), (_LOAD, 0, 0, 16 + 8 * argument), (_BITS, 0, 1, bits)]
            code += [(_RETURN, 0, 0, yes), (_RETURN, 0, 0, no)]
    code.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("HBBI", *line) for line in code)


def confine(memory: int, seconds: int, output: int) -> None:
    """Limits that hold for the rest of this process's life. Raises OSError where the kernel does not take them."""
    for kind, value in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, output),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 64),
    ):
        resource.setrlimit(kind, (value, value))
    program = filter_program(platform.machine())
    held = ctypes.create_string_buffer(program, len(program))
    of_kernel = struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(held))
    libc = ctypes.CDLL(None, use_errno=True)
    for call in ((38, 1, 0, 0, 0), (22, 2, ctypes.create_string_buffer(of_kernel, len(of_kernel)), 0, 0)):
        if libc.prctl(*call) != 0:
            raise OSError(ctypes.get_errno(), f"seccomp: {os.strerror(ctypes.get_errno())}")


def run(job: dict[str, Any]) -> None:
    """Run job["code"] as a program that reads job["stdin"]; then job["tests"] in its names, and at their end the token.

    Tests that fail raise, which ends the process with 1.
    """
    token = job.pop("token").encode()
    names: dict[str, Any] = {"__name__": "__main__", "__builtins__": __builtins__}
    sys.stdin = io.StringIO(job["stdin"])
    exec(compile(job["code"], "<answer>", "exec"), names)
    if job["tests"]:
        exec(compile(job["tests"], "<tests>", "exec"), names)
        os.write(1, token)


def main() -> None:
    job = json.loads(sys.stdin.buffer.read())
    platform.machine()  # cached from here on: it may read files and start a process
    if job["tests"]:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - held to the end; the answer's words are not the verdict's
    confine(job.pop("memory"), job.pop("seconds"), job.pop("output"))
    run(job)


if __name__ == "__main__":
    main()
