"""Each accepted variation of config.json changes the network as in transformers: the logits are the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import LLAMA3_ROPE, model_config, save_model
from transformers import AutoModelForCausalLM

from nemo_disco.policy import parallel
from nemo_disco.policy.attention import PackedSequences
from nemo_disco.policy.policy import Policy

LLAMA3 = {name: value for name, value in LLAMA3_ROPE.items() if name != "rope_theta"}
ABSENT = object()  # a field to leave out
VARIATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "no rope at all": ("qwen2", {"rope_parameters": ABSENT}),
    "rope of transformers 4": ("qwen2", {"rope_parameters": ABSENT, "rope_theta": 500.0}),
    "linear rope of transformers 4": (
        "mistral",
        {"rope_parameters": ABSENT, "rope_theta": 500, "rope_scaling": {"type": "linear", "factor": 4}},
    ),
    "linear rope of transformers 5": (
        "qwen3",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 700.0}},
    ),
    "llama3 rope of transformers 4": (
        "llama",
        {"rope_parameters": ABSENT, "rope_theta": 500.0, "rope_scaling": LLAMA3},
    ),
    "llama3 rope of a Qwen2": ("qwen2", {"rope_parameters": LLAMA3_ROPE}),
    "theta beside rope_parameters": ("llama", {"rope_parameters": LLAMA3, "rope_theta": 300.0}),
    "epsilon left out": ("llama", {"rms_norm_eps": ABSENT}),
    "epsilon": ("qwen3", {"rms_norm_eps": 0.1}),
    "swish": ("llama", {"hidden_act": "swish"}),
    "a window that is not used": ("qwen2", {"sliding_window": 4, "use_sliding_window": False}),
    "a window of no layer": (
        "qwen2",
        {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 4, "layer_types": ABSENT},
    ),
    "harmless fields": (
        "llama",
        {"pretraining_tp": 2, "use_cache": False, "top_p": 0.9, "attention_bias": False, "mlp_bias": False},
    ),
}


@pytest.mark.parametrize("name", VARIATIONS)
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    architecture, changes = VARIATIONS[name]
    shape = {"head_dim": 24} if architecture != "qwen2" else {}  # differs from hidden_size / num_attention_heads
    directory = save_model(tmp_path, architecture, tied=False, **shape)
    fields = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps({k: v for k, v in fields.items() if v is not ABSENT}))
    config = model_config(directory)
    parallel.start(config)
    ids = torch.randint(0, 130, (1, 150), generator=torch.Generator().manual_seed(1))
    sequences = PackedSequences.from_lengths([150])
    with torch.no_grad():
        logits = Policy(config, trainable=False).model.chunks[0](
            ids, torch.arange(150)[None], None, packed_seq_params=sequences
        )
        expected = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)(ids).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
