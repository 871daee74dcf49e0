"""Converts directories, as `python peak_memory.py CONVERSION SOURCE OUT [MODEL] / CONVERSION ...`, and prints for each
by how many bytes the process's own memory (without page cache) grew at most. Each runs in a fresh process."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

from nemo_disco.conversion import convert


def anonymous() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


def measure(name: str, source: str, out: str, *model: str) -> None:
    done, peak = threading.Event(), [anonymous()]
    begin = peak[0]

    def watch() -> None:
        while not done.wait(0.001):
            peak[0] = max(peak[0], anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    getattr(convert, name)(Path(source), Path(out), *map(Path, model))
    done.set()
    thread.join()
    print(peak[0] - begin, flush=True)


def main() -> None:
    for conversion in " ".join(sys.argv[1:]).split(" / "):
        pid = os.fork()
        if pid == 0:
            measure(*conversion.split())
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0


if __name__ == "__main__":
    main()
