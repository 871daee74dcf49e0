"""A run as short as can be, inside a job: starts an engine on another node, says when it serves, and at the file `end`
ends it, whatever state that is in. Called with the node, the engine's Python, a model and a directory."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from nemo_disco.generation.external.replica import Place, Replica


def main(host: str, python: str, model: str, directory: Path) -> None:
    settings = {"model": model, "dtype": "float32", "options": {"told": str(directory / "told")}}
    replica = Replica("engine", Place(python, directory / "engine.log", (), host), settings)
    replica.start()
    replica.wait_ready()
    (directory / "ready").write_text(replica.ready["staging"]["kind"])
    while not (directory / "end").exists():
        time.sleep(0.1)
    replica.end()


if __name__ == "__main__":
    main(*sys.argv[1:4], Path(sys.argv[4]))
