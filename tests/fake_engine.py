"""A worker with a fake engine: its process, wire and refit are the real ones, its responses a few lines of arithmetic.

The tokens of a response are a function of the weights, the prompt and the seed (`response_tokens`), so that a test can
compute them. The engine's `options` ask for faults, delays and files that record its work: see FakeEngine.
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

import numpy as np
from safetensors.torch import save_file
from torch import Tensor

from nemo_disco.generation.worker.rollout_worker.tensors import Assembly
from nemo_disco.generation.worker.rollout_worker.wire import map_staging

VOCABULARY = 100
# Overrides for commands that sample from the fake engine, whose log-probs do not match the policy's.
ANY_MISMATCH = ("verify.max_mismatch=1e300", "verify.max_kl=1e300")


def response_tokens(weights: dict[str, str], prompt: Sequence[int], seed: int, limit: int) -> list[int]:
    """The tokens of the fake engine's response, 1 to `limit` of them. weights: the tensors' checksums by name."""
    digest = hashlib.sha256(repr((sorted(weights.items()), list(prompt), seed)).encode()).digest()
    return [byte % VOCABULARY for byte in digest[: 1 + digest[0] % limit]]


class FakeEngine:
    """The worker's engine, on one rank and without a GPU. settings["options"] may have:

    routes: returns these [layers, K] experts of every token: the token's id modulo 4.
    unbuildable: the message of an error on construction. slow: seconds of delay after each response.
    settings_file: gets a line of JSON with the settings and the process id of each process. keep: a file that gets the
    weights after each refit. notes: a file that gets a line for each operation.
    fault: the operation that fails; at: after how many of its items; call: in which call of `generate` at the earliest;
    how: "kill" (the process), "hang" or otherwise an error. A fault occurs once, in one process: the file `once` is
    created then. always: every time.
    """

    gpu = False

    def __init__(self, settings: dict[str, Any]) -> None:
        self.options, self.calls = settings["options"], 0
        self.sleeps = settings.get("sleeps", True)
        if "unbuildable" in self.options:
            raise ValueError(self.options["unbuildable"])
        if "settings_file" in self.options:
            process = {"pid": os.getpid(), "node": os.environ.get("SLURMD_NODENAME")}
            with open(self.options["settings_file"], "a") as file:
                file.write(json.dumps(process | settings) + "\n")
        self.weights: dict[str, str] = {}

    def generate(self, prompts: Any, seeds: Any, sampling: dict[str, Any], deliver: Any, heartbeat: Any) -> None:
        self.calls += 1
        self._note("generate")
        print(f"asked for {len(prompts)}", flush=True)
        for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            if self.calls >= self.options.get("call", 1):
                self._fault("generate", i)
            tokens = response_tokens(self.weights, prompt, seed, sampling["max_tokens"])
            truncated = len(tokens) == sampling["max_tokens"]
            routes = None
            if "routes" in self.options:
                read = np.array([*prompt, *tokens][:-1], np.uint8) % 4
                routes = np.broadcast_to(read[:, None, None], (len(read), *self.options["routes"]))
            deliver(i, tokens, [-0.5] * len(tokens), "length" if truncated else "stop", routes)
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
        """Fail as the option `how` says, if the options `fault` and `at` (by default 0) are `where` and `count`."""
        if self.options.get("fault") != where or count != self.options.get("at", 0):
            return
        try:
            Path(self.options["once"]).touch(exist_ok=False)  # fails in all but one of several replicas
        except FileExistsError:
            if "always" not in self.options:
                return
        if self.options["how"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.options["how"] == "hang":
            time.sleep(1000)
        raise RuntimeError("error of the fake engine")


def fake_python(directory: Path, file: str = __file__) -> str:
    """Create an executable that stands in for the Python of an engine's environment. Returns its path.

    It runs `file`, whatever module its arguments name.
    """
    script = directory / "python"
    root = Path(__file__).parents[1]
    script.write_text(f'#!/bin/sh\nPYTHONPATH="$PYTHONPATH:{root}" exec {sys.executable} {file} "$@"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return str(script)


if __name__ == "__main__":
    import rollout_worker.__main__ as worker

    worker._build_engine = FakeEngine
    worker.main()
