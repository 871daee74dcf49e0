"""Memory of this host, within the job's limits (from /proc and the control groups), and limits of this process."""

from __future__ import annotations

import os
import resource
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def total_memory() -> int:
    """Bytes that the processes of this job may use on this host."""
    return min([_meminfo("MemTotal"), *(limit for limit, _ in _group_limits())])


def free_memory() -> int:
    """Bytes that this process may still allocate, its equal share among the ranks of this host."""
    free = [_meminfo("MemAvailable"), *(limit - used for limit, used in _group_limits())]
    return max(min(free), 0) // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def set_limit(kind: int, value: int) -> None:
    """Set this process's soft limit of a resource (resource.RLIMIT_*), at most its hard limit."""
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _meminfo(field: str) -> int:
    """A field of /proc/meminfo in bytes; without that file (macOS), the machine's whole memory."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _group_limits() -> list[tuple[int, int]]:
    """(limit, use) in bytes of each control group (version 2) of this process, such as SLURM's or a container's. Use
    leaves out the page cache, which the kernel frees when memory is short."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    limits = []
    for group in (line[3:].lstrip("/") for line in lines if line.startswith("0::")):
        for directory in (CGROUP / group, *(CGROUP / group).parents):
            try:
                limit = (directory / "memory.max").read_text().strip()
                if limit != "max":
                    cached = dict(line.split() for line in (directory / "memory.stat").read_text().splitlines())
                    used = int((directory / "memory.current").read_text())
                    limits.append((int(limit), used - int(cached.get("inactive_file", 0))))
            except (OSError, ValueError):
                continue  # the root has no limit, and version 1 has other files
    return limits
