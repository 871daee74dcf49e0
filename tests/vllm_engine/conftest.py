"""vLLM for real, in the environment that `make vllm` makes. `make test-vllm` alone collects these: pytest -m vllm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from models import model_config, save_model

from nemo_disco.generation.external import ExternalEngine
from nemo_disco.generation.replica import Place, Replica
from nemo_disco.policy import parallel
from nemo_disco.policy.policy import Policy

PYTHON = Path(__file__).parents[2] / ".venv-vllm/bin/python"
STOP = [1, 7]
# vLLM's attention on a CPU knows heads of 32 and more.
SHAPE = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    return None if config.getoption("markexpr") == "vllm" else True


@pytest.fixture(scope="module", params=["qwen2-tied", "llama-untied"])
def model_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    architecture, tying = request.param.split("-")
    return save_model(tmp_path_factory.mktemp(request.param), architecture, tied=tying == "tied", **SHAPE)


@pytest.fixture(scope="module")
def policy(model_path: Path) -> Policy:
    config = model_config(model_path)
    parallel.start(config)
    return Policy(config, temperature=0.6)


@pytest.fixture(scope="module")
def start(
    model_path: Path, policy: Policy, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., ExternalEngine]]:
    """start(**settings) -> a vLLM engine on the model, without weights."""
    assert policy.dtype.is_floating_point  # the process group is there
    started: list[ExternalEngine] = []

    def build(**changes: Any) -> ExternalEngine:
        settings = {
            "engine": "vllm",
            "model": str(model_path),
            "dtype": "float32",
            "bucket_bytes": 300_000,  # several buckets, each with parts of layers
            "stop_token_ids": STOP,
            "max_length": 200,
            "tensor_parallel_size": 1,
            "trust_remote_code": False,
            "quantization": None,
            "sleeps": False,
            "options": {"kv_cache_memory_bytes": 1 << 26},
        } | changes
        place = Place(str(PYTHON), tmp_path_factory.mktemp("logs") / "0.log")
        started.append(ExternalEngine([Replica("engine vllm, replica 0", place, settings)]))
        return started[-1]

    yield build
    for engine in started:
        engine.close()


@pytest.fixture(scope="module")
def engine(start: Callable[..., ExternalEngine]) -> ExternalEngine:
    """One engine for the tests that leave it whole."""
    return start()
