"""Converts a directory, as `python peak_memory.py CONVERSION SOURCE OUT [MODEL]`, and prints by how many bytes the
process's own memory (page cache apart) grew at most."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from nemo_disco.conversion import convert


def anonymous() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


def main() -> None:
    name, source, out, *model = sys.argv[1:]
    done, peak = threading.Event(), [anonymous()]
    begin = peak[0]

    def watch() -> None:
        while not done.wait(0.001):
            peak[0] = max(peak[0], anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    if name == "megatron_to_hf":
        convert.megatron_to_hf(Path(source), Path(out), Path(model[0]))
    else:
        getattr(convert, name)(Path(source), Path(out))
    done.set()
    thread.join()
    print(peak[0] - begin)


if __name__ == "__main__":
    main()
