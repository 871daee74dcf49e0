"""A worker with a fake engine: the real process, wire and refit, and responses made by a few lines of arithmetic.

Tokens are a function of the weights, the prompt and the seed, so that a test can compute them (`answer`). `options` may
name a fault, which occurs once: the file `once` is created when it has. The file `keep` gets the weights after each
refit, the file `told` a line with the settings of each process, the file `notes` a line for each operation.
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
# Overrides for commands that sample from it: its log-probs do not match the policy's.
ANY_MISMATCH = ("verify.max_mismatch=1e300", "verify.max_kl=1e300")


def answer(weights: dict[str, str], prompt: Sequence[int], seed: int, limit: int) -> list[int]:
    """The tokens of the engine's response. weights: checksums by name."""
    digest = hashlib.sha256(repr((sorted(weights.items()), list(prompt), seed)).encode()).digest()
    return [byte % VOCABULARY for byte in digest[: 1 + digest[0] % limit]]


class FakeEngine:
    gpu = False

    def __init__(self, settings: dict[str, Any]) -> None:
        self.options, self.calls = settings["options"], 0
        self.sleeps = settings.get("sleeps", True)
        if "unbuildable" in self.options:
            raise ValueError(self.options["unbuildable"])
        if "told" in self.options:
            process = {"pid": os.getpid(), "node": os.environ.get("SLURMD_NODENAME")}
            with open(self.options["told"], "a") as file:
                file.write(json.dumps(process | settings) + "\n")
        self.weights: dict[str, str] = {}

    def generate(self, prompts: Any, seeds: Any, sampling: dict[str, Any], deliver: Any, heartbeat: Any) -> None:
        self.calls += 1
        self._note("generate")
        print(f"asked for {len(prompts)}", flush=True)
        for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            if self.calls >= self.options.get("call", 1):
                self._fault("generate", i)
            tokens = answer(self.weights, prompt, seed, sampling["max_tokens"])
            truncated = len(tokens) == sampling["max_tokens"]
            deliver(i, tokens, [-0.5] * len(tokens), "length" if truncated else "stop")
            time.sleep(self.options.get("slow", 0))
            heartbeat()

    def open_staging(self, path: str, shape: tuple[int, int], remote: bool) -> list[dict[str, Any]]:  # noqa: ARG002
        self.slots = map_staging(path, shape)
        return [{}]

    def receive(self, slot: int) -> None:
        """Do nothing: on a CPU there is no broadcast."""

    def begin_refit(self) -> None:
        self._note("begin")
        self.weights, self.assembly = {}, Assembly()
        self.kept: dict[str, Tensor] = {}

    def load_bucket(self, slot: int, pieces: Sequence[Any]) -> dict[str, str]:
        checksums = {}
        for name, tensor, checksum in self.assembly.take(self.slots[slot], pieces):
            self._fault("refit", len(self.weights))
            if "keep" in self.options:
                self.kept[name] = tensor
            self.weights[name] = checksums[name] = checksum
        return checksums

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

    def _note(self, operation: str) -> None:
        if "notes" in self.options:
            with open(self.options["notes"], "a") as notes:
                notes.write(f"{operation}\n")

    def _fault(self, where: str, count: int) -> None:
        """Fail in the way of the option `how`, if the option `fault` is this place and `at` this count."""
        if self.options.get("fault") != where or count != self.options.get("at", 0):
            return
        try:
            Path(self.options["once"]).touch(exist_ok=False)  # of two replicas at once only one fails
        except FileExistsError:
            if "always" not in self.options:
                return
        if self.options["how"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.options["how"] == "hang":
            time.sleep(1000)
        raise RuntimeError("error of the fake engine")


def fake_python(directory: Path, file: str = __file__) -> str:
    """Create an executable that stands in for an engine's Python and runs `file`, whatever the module it is given."""
    script = directory / "python"
    root = Path(__file__).parents[1]
    script.write_text(f'#!/bin/sh\nPYTHONPATH="$PYTHONPATH:{root}" exec {sys.executable} {file} "$@"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return str(script)


if __name__ == "__main__":
    import rollout_worker.__main__ as worker

    worker._build_engine = FakeEngine
    worker.main()
