"""A minimal run inside a job: starts an engine on another node, writes the file `ready` when it serves, and ends it in
whatever state it is once the file `end` exists. Arguments: node, the engine's Python, model, directory of the files."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from nemo_disco.generation.external.replica import Place, Replica


def main(host: str, python: str, model: str, directory: Path) -> None:
    settings = {"model": model, "dtype": "float32", "options": {"settings_file": str(directory / "settings.jsonl")}}
    replica = Replica("engine", Place(python, directory / "engine.log", (), host), settings)
    replica.start()
    replica.wait_ready()
    (directory / "ready").write_text(replica.ready["staging"]["kind"])
    while not (directory / "end").exists():
        time.sleep(0.1)
    replica.end()


if __name__ == "__main__":
    main(*sys.argv[1:4], Path(sys.argv[4]))
