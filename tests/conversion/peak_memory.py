"""Peak memory of conversions: `python peak_memory.py CONVERSION SOURCE OUT [MODEL] / CONVERSION ...`.

Runs each conversion in a process of its own, and prints by how many bytes that process's own memory (without page
cache) grew at most.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

from nemo_disco.conversion import convert


def anonymous_memory() -> int:
    """Bytes of this process's resident memory, without pages of files."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


def measure(name: str, source: str, out: str, *model: str) -> None:
    """Run a conversion of nemo_disco.conversion.convert, and print the growth of memory in bytes."""
    done, peak = threading.Event(), [anonymous_memory()]
    begin = peak[0]

    def watch() -> None:
        while not done.wait(0.001):
            peak[0] = max(peak[0], anonymous_memory())

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
