"""Fixtures that run a function of a test module on several real processes."""

from __future__ import annotations

import multiprocessing
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_rank

TIMEOUT_S = 1800  # long enough that only a hang reaches it, even on a busy machine
# Imported once, in the process that the ranks are forked from: importing takes longer than most tests.
HEAVY = [
    "nemo_disco.commands.train",
    *(f"transformers.models.{name}.modeling_{name}" for name in ("qwen2", "qwen3", "llama", "mistral")),
]
multiprocessing.set_forkserver_preload(HEAVY)  # the process starts with the first test that needs it


@pytest.fixture
def run_on_ranks(tmp_path: Path) -> Callable[..., list[Any]]:
    """A function that calls another one on every rank: run_on_ranks(world_size, function, *arguments) -> results.

    The results are listed by rank. The function must be at the top level of a module, because the processes, which have
    imported only libraries, import it again; it is called within a process group. If a rank raises, or if TIMEOUT_S
    pass, all ranks are ended and the test fails.
    """
    return _make_runner(tmp_path, "forkserver")


@pytest.fixture
def run_on_new_ranks(tmp_path: Path) -> Callable[..., list[Any]]:
    """Like run_on_ranks, but each rank is a new interpreter with this process's environment instead of a fork."""
    return _make_runner(tmp_path, "spawn")


def _make_runner(tmp_path: Path, start_method: str) -> Callable[..., list[Any]]:
    def run(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        meeting = tmp_path / f"meeting-{secrets.token_hex(4)}"
        context = torch.multiprocessing.start_processes(
            run_rank,
            (world_size, meeting, function, arguments),
            nprocs=world_size,
            join=False,
            start_method=start_method,
        )
        deadline = time.monotonic() + TIMEOUT_S
        try:
            while not context.join(1, grace_period=5):
                assert time.monotonic() < deadline, f"the ranks still ran after {TIMEOUT_S} s"
        finally:
            for process in context.processes:
                process.kill()
        return [torch.load(meeting.with_suffix(f".{rank}"), weights_only=False) for rank in range(world_size)]

    return run
