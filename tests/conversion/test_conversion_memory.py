"""A conversion needs the memory of a few tensors, not of the model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from nemo_disco.models.shape import read_shape

CONFIG = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 256, "intermediate_size": 2048,
    "num_hidden_layers": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 20000,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "dtype": "float32",
}  # fmt: skip
# In a checkpoint the experts of all layers are one tensor of 100 MB, and another of 50.
EXPERTS = CONFIG | {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 16, "num_experts_per_tok": 2,
    "moe_intermediate_size": 128, "head_dim": 64,
}  # fmt: skip
LARGEST = 20000 * 256 * 4  # bytes of the largest tensor of a file


def save(directory: Path, config: dict[str, Any]) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    tensors = {name: torch.zeros(shape) for name, shape in read_shape(directory).tensors().items()}
    save_file(tensors, directory / "model.safetensors")
    assert (directory / "model.safetensors").stat().st_size > 9 * LARGEST
    return directory


@pytest.mark.parametrize("experts", [False, True])
def test_the_peak_is_at_most_three_times_the_largest_tensor(experts: bool, tmp_path: Path) -> None:
    source = save(tmp_path / "model", EXPERTS if experts else CONFIG)
    megatron, nemo = tmp_path / "megatron", tmp_path / "nemo"
    conversions = {
        "hf_to_megatron": [source, megatron],
        "megatron_to_hf": [megatron, tmp_path / "back", source],
    }
    if not experts:  # NeMo's classes with experts are not written
        conversions |= {"hf_to_nemo": [source, nemo], "nemo_to_hf": [nemo, tmp_path / "again"]}
    arguments = " / ".join(f"{name} {' '.join(map(str, paths))}" for name, paths in conversions.items()).split()
    command = [sys.executable, str(Path(__file__).with_name("peak_memory.py")), *arguments]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    peaks = dict(zip(conversions, map(int, done.stdout.split()), strict=True))
    assert max(peaks.values()) <= 3 * LARGEST, peaks
    assert max(peaks.values()) > LARGEST, peaks  # otherwise the measurement is at fault
