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

LAYOUTS = {
    "TP2xPP2": ("qwen2", {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    "TP4": ("qwen2", {"tensor_model_parallel_size": 4}),  # pads the vocabulary
    "EP2xPP2": ("qwen3_moe", {"expert_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    "EP2xTP2": (
        "mixtral",
        {"expert_model_parallel_size": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True},
    ),
}


def load_save_and_export(source: Path, megatron: Path, run: Path, layout: dict[str, Any]) -> bool:
    """Load the checkpoint `megatron`, save a policy of the source's weights into `run`, and export the loaded policy.

    Returns whether the loaded weights equal the source's bit for bit.
    """
    config = model_config(source, **layout)
    parallel.start(config)
    policy = Policy(model_config(megatron / convert.HF_FILES, **layout), trainable=False, read_weights=False)
    checkpoint.load(policy, megatron)
    expected = load_file(source / "model.safetensors")
    equal = all(torch.equal(tensor, expected.pop(name)) for name, tensor in policy.named_weights())
    checkpoint.save(Policy(config), run, 1, {}, keep=1)
    policy.export(run.with_name("export"))
    return equal and not expected


@pytest.mark.parametrize("name", LAYOUTS)
def test_conversion_at_any_layout(name: str, tmp_path: Path, run_on_ranks: Callable[..., list[Any]]) -> None:
    architecture, layout = LAYOUTS[name]
    source = save_model(tmp_path / "model", architecture, tied=False)
    megatron = convert.hf_to_megatron(source, tmp_path / "megatron")
    assert run_on_ranks(4, load_save_and_export, source, megatron, tmp_path / "checkpoints", layout) == [True] * 4
    converted = convert.megatron_to_hf(tmp_path / "checkpoints/step_1", tmp_path / "back", source)
    expected = load_file(source / "model.safetensors")
    for directory in (converted, tmp_path / "export"):
        weights = load_file(directory / "model.safetensors")
        assert weights.keys() == expected.keys() and all(
            torch.equal(weights[name], expected[name]) for name in expected
        )
