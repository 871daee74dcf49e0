"""Loading or converting a damaged checkpoint or model directory works, or ends in an error of one line."""

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
from damage import spoil
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from in_process import ends_well
from tiny_models import model_config, save_model

from nemo_disco import checkpoint
from nemo_disco.conversion import convert
from nemo_disco.policy import parallel
from nemo_disco.policy.policy import Policy
from nemo_disco.runtime.errors import UserError

sys.path.insert(0, str(Path(__file__).parents[2]))

from tools.convert import hf_to_megatron, hf_to_nemo, megatron_to_hf, nemo_to_hf


@pytest.fixture(autouse=True)
def ends() -> Iterator[None]:
    yield
    if dist.is_initialized():
        parallel.stop()


def damaged(sound: Path, copy: Path, use: Callable[[Path], object], examples: int) -> None:
    """Use copies of a directory with one or two of its files damaged; only UserError may be raised."""
    names = sorted(str(path.relative_to(sound)) for path in sound.rglob("*") if path.is_file())

    @settings(max_examples=examples, derandomize=True, deadline=20_000, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def spoiled(data: st.DataObject) -> None:
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(sound, copy)
        for name in data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True)):
            spoil(copy / name, data)
        with contextlib.suppress(UserError):
            use(copy)

    spoiled()


def test_a_damaged_checkpoint_is_loaded_resumed_from_or_refused(tmp_path: Path) -> None:
    """`load` is what `evaluate` does with a checkpoint, `load_latest` what a resumed run does."""
    config = model_config(save_model(tmp_path / "model", "qwen2", tied=True))
    parallel.start(config)
    policy = Policy(config, dtype=torch.float32, total_optimizer_steps=20)
    checkpoint.save(policy, tmp_path / "checkpoints", 1, {"step": 1}, keep=1)

    def use(copy: Path) -> None:
        with contextlib.suppress(UserError):
            checkpoint.load(policy, copy / "step_1")
        checkpoint.load_latest(policy, copy)

    damaged(tmp_path / "checkpoints", tmp_path / "copy", use, 40)


def test_a_damaged_source_is_converted_or_refused(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "qwen2", tied=True)
    sources = {
        hf_to_megatron: model,
        hf_to_nemo: model,
        megatron_to_hf: convert.hf_to_megatron(model, tmp_path / "megatron"),
        nemo_to_hf: convert.hf_to_nemo(model, tmp_path / "nemo"),
    }
    for command, source in sources.items():

        def convert_to_new(copy: Path, command: Any = command) -> None:
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
            ends_well([str(copy), str(tmp_path / "out")], command.main)

        assert ends_well([str(source), str(tmp_path / "sound")], command.main) == ""
        shutil.rmtree(tmp_path / "sound")
        damaged(source, tmp_path / "copy", convert_to_new, 15)
