"""Builds the seccomp filter of a graded program: the calls that computing needs are allowed, all others refused.

libseccomp (through pyseccomp) knows each architecture's call numbers and writes the filter. The trainer runs this.
"""

from __future__ import annotations

import errno
import os
import tempfile
from types import ModuleType
from typing import Any

from nemo_disco.runtime.errors import UserError

# Allowed with any arguments: they compute, read, wait, and write to files that are open already.
_ALLOWED = """
    brk mmap munmap mremap mprotect madvise membarrier
    read pread64 readv preadv preadv2 write writev lseek close close_range
    dup dup2 dup3 pipe pipe2 eventfd eventfd2
    poll ppoll select pselect6 epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2
    stat lstat fstat newfstatat statx access faccessat faccessat2 readlink readlinkat getdents getdents64 getcwd
    fstatfs statfs
    futex get_robust_list set_robust_list set_tid_address rseq sched_yield sched_getaffinity getcpu arch_prctl
    rt_sigaction rt_sigprocmask rt_sigreturn rt_sigtimedwait rt_sigsuspend rt_sigpending sigaltstack restart_syscall
    pause alarm setitimer getitimer
    time gettimeofday clock_gettime clock_getres nanosleep clock_nanosleep times getrusage
    getpid gettid getppid getpgrp getpgid getsid getuid geteuid getgid getegid getgroups getresuid getresgid
    getpriority getrlimit uname sysinfo getrandom
    recvfrom recvmsg shutdown
    exit exit_group
"""
# Newer calls that the C library tries first: told that they do not exist, it makes an older one.
_REPORTED_MISSING = "clone3 openat2 fchmodat2 futex_waitv mseal map_shadow_stack"

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_O_ASYNC = 0x2000  # sends a signal to the descriptor's owner, which may be any process
_SHARED_FLAGS = _O_ASYNC | os.O_APPEND | os.O_DIRECT  # they would stay set on an inherited descriptor
_THREAD, _NAMESPACES = 0x10100, 0x7E020000  # CLONE_THREAD | CLONE_VM; CLONE_NEW*
_CLONE_PTRACE, _CLONE_PARENT = 0x2000, 0x8000
_SOCK_STREAM, _SOCK_TYPE, _AF_UNIX = 1, 0xF, 1
_F_DUPFD, _F_GETFD, _F_SETFD, _F_GETFL, _F_SETFL, _F_DUPFD_CLOEXEC = 0, 1, 2, 3, 4, 1030
_IOCTLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # TCGETS TIOCGWINSZ FIONREAD FIONBIO FIONCLEX FIOCLEX
_PR_SET_NAME, _PR_GET_NAME = 15, 16
_SOL_SOCKET, _SO_TYPE, _SO_ERROR, _SO_PROTOCOL, _SO_DOMAIN = 1, 3, 4, 38, 39  # others reveal the peer's process


def build_filter(architecture: int | None = None) -> bytes:
    """The filter in the kernel's format, classic BPF.

    architecture: one of pyseccomp.Arch; None is this machine's. A call in another architecture's numbering (32-bit
    calls, x32) ends the process. Raises UserError if libseccomp or pyseccomp is not installed.
    """
    seccomp = _import_pyseccomp()
    refuse, report_missing = seccomp.ERRNO(errno.EPERM), seccomp.ERRNO(errno.ENOSYS)
    rules = seccomp.SyscallFilter(refuse)
    rules.set_attr(seccomp.Attr.ACT_BADARCH, seccomp.KILL_PROCESS)
    native = seccomp.system_arch()
    if architecture is not None and architecture != native:
        rules.add_arch(architecture)
        rules.remove_arch(native)

    def add_rule(action: int, name: str, *arguments: Any) -> None:
        number = seccomp.resolve_syscall(native if architecture is None else architecture, name)
        if number >= 0:  # negative if this architecture, or this libseccomp, has no such call
            rules.add_rule(action, seccomp.resolve_syscall(native, name), *arguments)

    for name in _ALLOWED.split():
        add_rule(seccomp.ALLOW, name)
    for name in _REPORTED_MISSING.split():
        add_rule(report_missing, name)
    for name, arguments in _conditions(seccomp):
        add_rule(seccomp.ALLOW, name, *arguments)
    with tempfile.TemporaryFile() as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read()


def _conditions(seccomp: ModuleType) -> list[tuple[str, list[Any]]]:
    """Pairs (call, conditions on its arguments): the call is allowed if all its conditions hold."""

    def equal(argument: int, value: int) -> Any:
        return seccomp.Arg(argument, seccomp.EQ, value)

    def masked(argument: int, mask: int, value: int) -> Any:
        return seccomp.Arg(argument, seccomp.MASKED_EQ, mask, value)

    fcntl_commands = [_F_DUPFD, _F_GETFD, _F_SETFD, _F_GETFL, _F_DUPFD_CLOEXEC]
    return [
        ("open", [masked(1, _WRITING, 0)]),
        ("openat", [masked(2, _WRITING, 0)]),
        ("clone", [masked(0, _THREAD | _NAMESPACES | _CLONE_PTRACE | _CLONE_PARENT, _THREAD)]),
        *(("fcntl", [equal(1, command)]) for command in fcntl_commands),
        ("fcntl", [equal(1, _F_SETFL), masked(2, _SHARED_FLAGS, 0)]),
        *(("ioctl", [equal(1, request)]) for request in _IOCTLS),
        *(("prctl", [equal(0, option)]) for option in (_PR_SET_NAME, _PR_GET_NAME)),
        ("prlimit64", [equal(0, 0)]),  # its own limits; it cannot raise a hard one
        ("setrlimit", []),
        # asyncio wakes itself through a pair of connected sockets, which reach no other address.
        ("socketpair", [equal(0, _AF_UNIX), masked(1, _SOCK_TYPE, _SOCK_STREAM)]),
        ("sendto", [equal(4, 0)]),
        *(
            ("getsockopt", [equal(1, _SOL_SOCKET), equal(2, option)])
            for option in (_SO_TYPE, _SO_ERROR, _SO_PROTOCOL, _SO_DOMAIN)
        ),
    ]


def _import_pyseccomp() -> ModuleType:
    try:
        import pyseccomp
    except ImportError as error:
        raise UserError("reward.verifier=python_tests needs the package pyseccomp: pip install pyseccomp") from error
    except RuntimeError as error:  # "Unable to find libseccomp"
        raise UserError(
            "reward.verifier=python_tests needs the system library libseccomp.so.2, which is not here: install "
            "libseccomp2 (Debian, Ubuntu) or libseccomp (RHEL, SUSE)"
        ) from error
    library: ModuleType = pyseccomp
    return library
