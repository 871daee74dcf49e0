"""A refit from any training layout gives the engine's process the policy's weights, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fake_engine import fake_python
from safetensors.torch import load_file
from tiny_models import model_config, save_model

from nemo_disco.generation.external.engine import ExternalEngine
from nemo_disco.generation.external.replica import Place, Replica
from nemo_disco.policy import parallel
from nemo_disco.policy.policy import Policy

BUCKET_BYTES = 1  # gives the smallest possible bucket, so that most tensors come in pieces


def refit_twice(source: Path, work: Path, layout: dict[str, int]) -> None:
    """Refit the first rank's engine twice, with a change of the weights in between. The engine's last weights are saved
    in work/kept, the policy's in work/export."""
    config = model_config(source, **layout)
    parallel.start(config)
    policy = Policy(config)
    replicas = []
    if dist.get_rank() == 0:
        settings = {"model": str(source), "dtype": "float32", "bucket_bytes": BUCKET_BYTES}
        options = {"options": {"keep": str(work / "kept")}}
        replicas.append(Replica("replica", Place(fake_python(work), work / "log"), settings | options))
    engine = ExternalEngine(replicas)
    try:
        engine.update_weights(policy.named_weights, 0)
        with torch.no_grad():
            for parameter in policy.model.chunks[0].parameters():
                parameter.mul_(1.5)
        engine.update_weights(policy.named_weights, 1)
    finally:
        engine.close()
    policy.export(work / "export")


def check(tensor: int, pipeline: int, tied: bool, work: Path, run_on_ranks: Callable[..., list[Any]]) -> None:
    source = save_model(work / "model", "qwen2", tied=tied)
    layout = {"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline}
    run_on_ranks(tensor * pipeline, refit_twice, source, work, layout)
    engine_weights, policy_weights = load_file(work / "kept"), load_file(work / "export/model.safetensors")
    expected = {name: 1.5 * weight for name, weight in load_file(source / "model.safetensors").items()}
    if tied:
        expected.pop("lm_head.weight", None)
        policy_weights.pop("lm_head.weight", None)
    assert engine_weights.keys() == expected.keys() == policy_weights.keys()
    for name, weight in engine_weights.items():
        assert torch.equal(weight, expected[name]) and torch.equal(weight, policy_weights[name]), name


def test_the_engine_receives_the_policys_weights(tmp_path: Path, run_on_ranks: Callable[..., list[Any]]) -> None:
    check(2, 2, True, tmp_path, run_on_ranks)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tensor", "pipeline", "tied"), [(2, 2, False), (2, 1, True), (2, 1, False), (1, 2, True), (1, 2, False)]
)
def test_the_engine_receives_the_policys_weights_at_every_layout(
    tensor: int, pipeline: int, tied: bool, tmp_path: Path, run_on_ranks: Callable[..., list[Any]]
) -> None:
    check(tensor, pipeline, tied, tmp_path, run_on_ranks)
