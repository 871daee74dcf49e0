"""A vLLM engine in a process of its own, in the environment of `make vllm`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_disco.generation.external.engine import ExternalEngine
from nemo_disco.generation.external.replica import Place, Replica
from nemo_disco.policy.policy import Policy

PYTHON = Path(__file__).parents[2] / ".venv-vllm/bin/python"
STOP = [1, 7]
# vLLM's attention on a CPU needs heads of at least 32.
SHAPE = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}


def start_vllm(model: Path, policy: Policy, logs: Path, **changes: Any) -> ExternalEngine:
    """Start a vLLM engine for the policy's model, without weights. changes: settings of the worker that differ."""
    settings = {
        "engine": "vllm",
        "model": str(model),
        "dtype": "float32",
        "bucket_bytes": 300_000,  # makes several buckets, which split layers
        "stop_token_ids": STOP,
        "vocabulary": policy.vocabulary,
        "max_length": 200,
        "tensor_parallel_size": 1,
        "trust_remote_code": False,
        "quantization": None,
        "routes": False,
        "sleeps": False,
        "options": {"kv_cache_memory_bytes": 1 << 26},
    } | changes
    return ExternalEngine([Replica("engine vllm, replica 0", Place(str(PYTHON), logs / "0.log"), settings)])
