"""A worker whose engine is a few lines of arithmetic: the real process, wire and transaction without an engine.

Its tokens are a function of the weights, the prompt and the seed, so a test knows what must come out. `options` say
what goes wrong, once: the file `once` is made when it has. The file `keep` is given the weights after each refit, the
file `told` a line of each process with what it was told, the file `notes` a line of each thing done.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import stat
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from nemo_disco.generation.worker.rollout_worker.tensors import Assembly
from nemo_disco.generation.worker.rollout_worker.wire import map_staging

VOCABULARY = 100
# Its log-probs are no model's: a command that samples from it goes on all the same.
ANY_MISMATCH = ("verify.max_mismatch=1e300", "verify.max_kl=1e300")


def answer(weights: dict[str, str], prompt: Sequence[int], seed: int, limit: int) -> list[int]:
    """The response that the engine samples. weights: checksums by name."""
    seen = hashlib.sha256(repr((sorted(weights.items()), list(prompt), seed)).encode()).digest()
    return [byte % VOCABULARY for byte in seen[: 1 + seen[0] % limit]]


class FakeEngine:
    gpu = False

    def __init__(self, settings: dict[str, Any]) -> None:
        self.options, self.calls = settings["options"], 0
        self.sleeps = settings.get("sleeps", True)
        if "unbuildable" in self.options:
            raise ValueError(self.options["unbuildable"])
        if "told" in self.options:
            about = {"pid": os.getpid(), "node": os.environ.get("SLURMD_NODENAME")}
            with open(self.options["told"], "a") as told:
                told.write(json.dumps(about | settings) + "\n")
        self.weights: dict[str, str] = {}

    def generate(self, prompts: Any, seeds: Any, sampling: dict[str, Any], deliver: Any, live: Any) -> None:
        self.calls += 1
        self._note("generate")
        print(f"asked for {len(prompts)}", flush=True)
        for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            if self.calls >= self.options.get("call", 1):
                self._fault("generate", i)
            tokens = answer(self.weights, prompt, seed, sampling["max_tokens"])
            cut = len(tokens) == sampling["max_tokens"]
            deliver(i, tokens, [-0.5] * len(tokens), "length" if cut else "stop")
            time.sleep(self.options.get("slow", 0))
            live()

    def open_staging(self, path: str, shape: tuple[int, int], remote: bool) -> list[dict[str, Any]]:  # noqa: ARG002
        self.slots = map_staging(path, shape)
        return [{}]

    def receive(self, slot: int) -> None:
        """Nothing: on a CPU there is no broadcast."""

    def begin_refit(self) -> None:
        self._note("begin")
        self.weights, self.assembly = {}, Assembly()
        self.kept: dict[str, Tensor] = {}

    def load_bucket(self, slot: int, pieces: Sequence[Any]) -> dict[str, str]:
        found = {}
        for name, tensor, seen in self.assembly.take(self.slots[slot], pieces):
            self._fault("refit", len(self.weights))
            if "keep" in self.options:
                self.kept[name] = tensor
            self.weights[name] = found[name] = seen
        return found

    def finish_refit(self) -> None:
        self._fault("finish", 0)
        self._note("commit")
        if self.kept:
            save_file(self.kept, self.options["keep"])

    def abort_refit(self) -> None:
        self.weights = {}

    def sleep(self) -> bool:
        self._fault("sleep", 0)
        if not self.sleeps:
            return False
        self._note("sleep")
        self.weights = {}
        return True

    def wake(self) -> None:
        self._fault("wake", 0)
        if self.sleeps:
            self._note("wake")
            assert not self.weights

    def _note(self, what: str) -> None:
        if "notes" in self.options:
            with open(self.options["notes"], "a") as notes:
                notes.write(f"{what}\n")

    def _fault(self, where: str, count: int) -> None:
        if self.options.get("fault") != where or count != self.options.get("at", 0):
            return
        try:
            Path(self.options["once"]).touch(exist_ok=False)  # of two replicas that are here at a time one alone fails
        except FileExistsError:
            if "always" not in self.options:
                return
        if self.options["how"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.options["how"] == "hang":
            time.sleep(1000)
        raise RuntimeError("the engine's own words")


def fake_python(directory: Path, file: str = __file__) -> str:
    """An executable that is called like an engine's Python, and runs `file`, which is in a folder of the root."""
    script = directory / "python"
    root = Path(__file__).parents[1]
    script.write_text(f'#!/bin/sh\nPYTHONPATH="$PYTHONPATH:{root}" exec {sys.executable} {file} "$@"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return str(script)


if __name__ == "__main__":
    import rollout_worker.__main__ as worker

    worker._build_engine = FakeEngine
    worker.main()
