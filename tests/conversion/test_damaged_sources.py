"""Loading or converting a damaged checkpoint or model directory succeeds or ends in an error of one line."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from damage import damage_file
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from in_process import run_in_process
from tiny_models import model_config, save_model

from nemo_disco import checkpoint
from nemo_disco.conversion import convert
from nemo_disco.policy import parallel
from nemo_disco.policy.policy import Policy
from nemo_disco.runtime.errors import UserError

sys.path.insert(0, str(Path(__file__).parents[2]))

from tools.convert import hf_to_megatron, hf_to_nemo, megatron_to_hf, nemo_to_hf


@pytest.fixture(autouse=True)
def stop_parallel() -> Iterator[None]:
    """Destroy the process groups after a test."""
    yield
    if dist.is_initialized():
        parallel.stop()


def use_damaged_copies(intact: Path, copy: Path, use: Callable[[Path], object], examples: int) -> None:
    """Call `use` on copies of a directory, each with one or two files damaged; only UserError may be raised.

    copy: where each copy is made.
    """
    names = sorted(str(path.relative_to(intact)) for path in intact.rglob("*") if path.is_file())

    @settings(max_examples=examples, derandomize=True, deadline=20_000, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def use_one(data: st.DataObject) -> None:
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(intact, copy)
        for name in data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True)):
            damage_file(copy / name, data)
        with contextlib.suppress(UserError):
            use(copy)

    use_one()


def test_a_damaged_checkpoint_is_loaded_resumed_from_or_refused(tmp_path: Path) -> None:
    """`evaluate` loads a checkpoint by `load`; a run that resumes does so by `load_latest`."""
    config = model_config(save_model(tmp_path / "model", "qwen2", tied=True))
    parallel.start(config)
    policy = Policy(config, dtype=torch.float32, total_optimizer_steps=20)
    checkpoint.save(policy, tmp_path / "checkpoints", 1, {"step": 1}, keep=1)

    def use(copy: Path) -> None:
        with contextlib.suppress(UserError):
            checkpoint.load(policy, copy / "step_1")
        checkpoint.load_latest(policy, copy)

    use_damaged_copies(tmp_path / "checkpoints", tmp_path / "copy", use, 40)


def test_a_damaged_source_is_converted_or_refused(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "qwen2", tied=True)
    sources = {
        hf_to_megatron: model,
        hf_to_nemo: model,
        megatron_to_hf: convert.hf_to_megatron(model, tmp_path / "megatron"),
        nemo_to_hf: convert.hf_to_nemo(model, tmp_path / "nemo"),
    }
    for command, source in sources.items():

        def convert_copy(copy: Path, command: Any = command) -> None:
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
            run_in_process([str(copy), str(tmp_path / "out")], command.main)

        assert run_in_process([str(source), str(tmp_path / "intact")], command.main) == ""
        shutil.rmtree(tmp_path / "intact")
        use_damaged_copies(source, tmp_path / "copy", convert_copy, 15)
