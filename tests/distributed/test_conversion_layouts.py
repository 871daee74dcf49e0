"""A converted checkpoint loads at any layout, and a checkpoint of any layout converts, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import model_config, save_model

from nemo_disco import checkpoint
from nemo_disco.conversion import convert
from nemo_disco.policy import parallel
from nemo_disco.policy.policy import Policy

LAYOUTS = [
    {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
    {"tensor_model_parallel_size": 4},  # pads the vocabulary
]


def through(source: Path, megatron: Path, run: Path, layout: dict[str, int]) -> bool:
    """True if the weights loaded from `megatron` equal the source's. Also saves a policy of the source's weights into
    `run`, and exports the loaded one."""
    config = model_config(source, **layout)
    parallel.start(config)
    policy = Policy(model_config(megatron / convert.CARRIED, **layout), trainable=False, read_weights=False)
    checkpoint.load(policy, megatron)
    expected = load_file(source / "model.safetensors")
    same = all(torch.equal(tensor, expected.pop(name)) for name, tensor in policy.named_weights())
    checkpoint.save(Policy(config), run, 1, {}, keep=1)
    policy.export(run.with_name("export"))
    return same and not expected


@pytest.mark.parametrize("layout", LAYOUTS, ids=["TP2xPP2", "TP4"])
def test_conversion_at_any_layout(layout: dict[str, int], tmp_path: Path, on_ranks: Callable[..., list[Any]]) -> None:
    source = save_model(tmp_path / "model", "qwen2", tied=False)
    megatron = convert.hf_to_megatron(source, tmp_path / "megatron")
    assert on_ranks(4, through, source, megatron, tmp_path / "checkpoints", layout) == [True] * 4
    back = convert.megatron_to_hf(tmp_path / "checkpoints/step_1", tmp_path / "back", source)
    expected = load_file(source / "model.safetensors")
    for directory in (back, tmp_path / "export"):
        weights = load_file(directory / "model.safetensors")
        assert weights.keys() == expected.keys() and all(
            torch.equal(weights[name], expected[name]) for name in expected
        )
