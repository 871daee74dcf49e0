"""This host's memory: what there is, and what a process may still take. Reads /proc and the control group's files."""

from __future__ import annotations

import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def total_memory() -> int:
    """Bytes that the processes of this job may use on this host."""
    return min([_machine("MemTotal"), *(limit for limit, _ in _limits())])


def free_memory() -> int:
    """Bytes that this process may still take, if the ranks of this host take alike."""
    left = [_machine("MemAvailable"), *(limit - used for limit, used in _limits())]
    return max(min(left), 0) // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def _machine(field: str) -> int:
    """A field of /proc/meminfo in bytes; where there is none (macOS), all that the machine has."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _limits() -> list[tuple[int, int]]:
    """The limit in bytes and the use of each control group (version 2) that this process is in: SLURM's, a container's.
    The page cache, which goes when it must, is not counted as use."""
    try:
        own = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for group in (line[3:].lstrip("/") for line in own if line.startswith("0::")):
        for directory in (CGROUP / group, *(CGROUP / group).parents):
            try:
                limit = (directory / "memory.max").read_text().strip()
                if limit != "max":
                    cached = dict(line.split() for line in (directory / "memory.stat").read_text().splitlines())
                    used = int((directory / "memory.current").read_text())
                    found.append((int(limit), used - int(cached.get("inactive_file", 0))))
            except (OSError, ValueError):
                continue  # the root has no limit, and version 1 has other files
    return found
