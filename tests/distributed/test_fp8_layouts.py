"""A checkpoint with FP8 delayed scaling can be resumed at any layout, because all ranks with a part of a layer hold the
same scaling state (they reduce their maxima). Real processes over gloo, with the stand-in layers of fused_layers.py."""

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


def copy_scales(policy: Policy) -> dict[str, dict[str, Tensor]]:
    """Scaling state of this rank's layers: tensors by the layer's key and their name."""
    return {
        key: {name: tensor.clone() for name, tensor in fp8_scales._state(layer).items()}
        for chunk in policy.model.chunks
        for key, layer in fp8_scales._layers(chunk)
    }


def write(model: str, root: str, layouts: list[Layout]) -> dict[str, Any]:
    """Train 2 steps, save, and train 1 more at each layout.

    Returns by layout: the scales that were saved, the loss after 2 steps, and this rank's fingerprint after 3.
    """
    outcome = {}
    for layout in layouts:
        policy = build(model, layout)
        train(policy, range(2))
        checkpoint.save(policy, Path(root) / str(layout), 2, {}, keep=1)
        saved_scales = copy_scales(policy)
        next_loss = loss(policy, 2)
        train(policy, [2])
        outcome[str(layout)] = saved_scales, next_loss, fingerprint(policy)
    return outcome


def read(model: str, root: str, layouts: list[Layout]) -> dict[tuple[str, str], Any]:
    """Resume every checkpoint at every layout and train 1 step.

    Returns the figures of `write` by the layouts of the checkpoint and of the policy.
    """
    outcome = {}
    for layout in layouts:
        for directory in sorted(Path(root).iterdir()):
            policy = build(model, layout)
            checkpoint.load_latest(policy, directory)
            assert not policy.unscaled, "the policy does not use the loaded scales in the first pass"
            loaded_scales = copy_scales(policy)
            next_loss = loss(policy, 2)
            train(policy, [2])
            outcome[directory.name, str(layout)] = loaded_scales, next_loss, fingerprint(policy)
    return outcome


def compare(saved_figures: list[dict[str, Any]], resumed_figures: list[dict[tuple[str, str], Any]]) -> None:
    exact = 0
    for rank, outcome in enumerate(resumed_figures):
        for (source, here), (loaded_scales, next_loss, checksum) in outcome.items():
            saved_scales = {key: tensors for ranks in saved_figures for key, tensors in ranks[source][0].items()}
            assert saved_scales.keys() == LAYERS and loaded_scales.keys() <= LAYERS and loaded_scales
            for key, tensors in loaded_scales.items():
                assert tensors.keys() == saved_scales[key].keys()
                assert all(torch.equal(tensors[name], saved_scales[key][name]) for name in tensors), (source, here, key)
            assert next_loss == pytest.approx(saved_figures[0][source][1], abs=2e-3), (source, here)
            if source == here and len(resumed_figures) == len(saved_figures):
                assert checksum == saved_figures[rank][source][2], f"{source} is not bit-exact on rank {rank}"
                exact += 1
    assert exact == (len(TWO) * len(resumed_figures) if len(resumed_figures) == len(saved_figures) else 0)


@pytest.mark.slow
def test_scales_can_be_loaded_at_any_layout(run_on_ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    model = str(save_model(tmp_path / "model", "qwen2", tied=True))
    root = str(tmp_path / "checkpoints")
    saved_figures = run_on_ranks(2, write, model, root, TWO)
    for layout in map(str, TWO):
        first, second = (ranks[layout][0] for ranks in saved_figures)
        for key in first.keys() & second.keys():  # both ranks hold these layers: they are of one pipeline stage
            assert all(torch.equal(first[key][name], second[key][name]) for name in first[key]), (layout, key)
        assert any(float(state["scale_fwd"][0]) != 1 for state in first.values()), "all scales are still 1"
    compare(saved_figures, run_on_ranks(2, read, model, root, TWO))
    compare(saved_figures, run_on_ranks(1, read, model, root, [(1, 1, 1)]))
