"""Tests with a real vLLM, in the environment of `make vllm`. Only `make test-vllm` collects them (pytest -m vllm)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_models import model_config, save_family
from vllm_process import SHAPE, start_vllm

from nemo_disco.generation.external.engine import ExternalEngine
from nemo_disco.policy import parallel
from nemo_disco.policy.policy import Policy


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    return None if config.getoption("markexpr") == "vllm" else True


@pytest.fixture(scope="module", params=["qwen2-tied", "llama-untied"])
def model_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family(tmp_path_factory.mktemp(request.param), request.param, **SHAPE)


@pytest.fixture(scope="module")
def policy(model_path: Path) -> Policy:
    config = model_config(model_path)
    parallel.start(config)
    return Policy(config, temperature=0.6)


@pytest.fixture(scope="module")
def start(
    model_path: Path, policy: Policy, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., ExternalEngine]]:
    """start(**settings) starts a vLLM engine for the model, which has no weights yet."""
    assert policy.dtype.is_floating_point  # the fixture has started the process group
    started: list[ExternalEngine] = []

    def build(**changes: Any) -> ExternalEngine:
        started.append(start_vllm(model_path, policy, tmp_path_factory.mktemp("logs"), **changes))
        return started[-1]

    yield build
    for engine in started:
        engine.close()


@pytest.fixture(scope="module")
def engine(start: Callable[..., ExternalEngine]) -> ExternalEngine:
    """The engine of all tests that do not break it."""
    return start()
