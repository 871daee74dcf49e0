"""The state of FP8 delayed scaling is the same on all ranks with a piece of a layer (they reduce their maxima), so that
a checkpoint can be resumed at any layout. Real processes over gloo, with stand-ins of the layers (fused_layers.py)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import fused_layers
import pytest
import torch
from tiny_models import model_config, save_model
from torch import Tensor
from training import fingerprint, loss, train

from nemo_disco import checkpoint
from nemo_disco.policy import fp8_scales, layers, parallel
from nemo_disco.policy import policy as policy_module
from nemo_disco.policy.policy import Policy

Layout = tuple[int, int, int]  # TP, PP, CP; the rest is DP
TWO: list[Layout] = [(2, 1, 1), (1, 2, 1), (1, 1, 2), (1, 1, 1)]
LAYERS = {f"{layer}.{name}" for layer in range(1, 5) for name in ("self_attention.linear_qkv", "mlp.linear_fc1")}


def build(model: str, layout: Layout) -> Policy:
    layers._transformer_engine_layer = fused_layers.fused_layer
    policy_module.uses_transformer_engine = lambda _: True
    tensor, pipeline, context = layout
    config = model_config(
        Path(model),
        fp8="delayed",
        token_budget=64,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        context_parallel_size=context,
    )
    parallel.start(config)
    return Policy(config, total_optimizer_steps=10)


def scales(policy: Policy) -> dict[str, dict[str, Tensor]]:
    """The scaling state of this rank's layers, by layer and name."""
    return {
        key: {name: tensor.clone() for name, tensor in fp8_scales._state(layer).items()}
        for chunk in policy.model.chunks
        for key, layer in fp8_scales._layers(chunk)
    }


def write(model: str, root: str, layouts: list[Layout]) -> dict[str, Any]:
    """Train 2 steps, save, and train 1 more. Returns for each layout the saved scales, the loss after 2 steps and this
    rank's fingerprint after 3."""
    outcome = {}
    for layout in layouts:
        policy = build(model, layout)
        train(policy, range(2))
        checkpoint.save(policy, Path(root) / str(layout), 2, {}, keep=1)
        saved = scales(policy)
        next_loss = loss(policy, 2)
        train(policy, [2])
        outcome[str(layout)] = saved, next_loss, fingerprint(policy)
    return outcome


def read(model: str, root: str, layouts: list[Layout]) -> dict[tuple[str, str], Any]:
    """Resume every checkpoint at every layout and train 1 step. Returns the same figures as `write`."""
    outcome = {}
    for layout in layouts:
        for directory in sorted(Path(root).iterdir()):
            policy = build(model, layout)
            checkpoint.load_latest(policy, directory)
            assert not policy.unscaled, "the loaded scales serve the first pass"
            loaded = scales(policy)
            next_loss = loss(policy, 2)
            train(policy, [2])
            outcome[directory.name, str(layout)] = loaded, next_loss, fingerprint(policy)
    return outcome


def compare(written: list[dict[str, Any]], resumed: list[dict[tuple[str, str], Any]]) -> None:
    exact = 0
    for rank, outcome in enumerate(resumed):
        for (source, here), (loaded, next_loss, bits) in outcome.items():
            saved = {key: tensors for ranks in written for key, tensors in ranks[source][0].items()}
            assert saved.keys() == LAYERS and loaded.keys() <= LAYERS and loaded
            for key, tensors in loaded.items():
                assert tensors.keys() == saved[key].keys()
                assert all(torch.equal(tensors[name], saved[key][name]) for name in tensors), (source, here, key)
            assert next_loss == pytest.approx(written[0][source][1], abs=2e-3), (source, here)
            if source == here and len(resumed) == len(written):
                assert bits == written[rank][source][2], f"{source} is not bit-exact on rank {rank}"
                exact += 1
    assert exact == (len(TWO) * len(resumed) if len(resumed) == len(written) else 0)


@pytest.mark.slow
def test_scales_can_be_loaded_at_any_layout(on_ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    model = str(save_model(tmp_path / "model", "qwen2", tied=True))
    root = str(tmp_path / "checkpoints")
    written = on_ranks(2, write, model, root, TWO)
    for layout in map(str, TWO):
        first, second = (ranks[layout][0] for ranks in written)
        for key in first.keys() & second.keys():  # of one stage
            assert all(torch.equal(first[key][name], second[key][name]) for name in first[key]), (layout, key)
        assert any(float(state["scale_fwd"][0]) != 1 for state in first.values()), "nothing was scaled"
    compare(written, on_ranks(2, read, model, root, TWO))
    compare(written, on_ranks(1, read, model, root, [(1, 1, 1)]))
