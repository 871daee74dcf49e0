"""Delayed scaling's state: each FP8 layer's scales, and the largest numbers of the steps that they come from.

As tensors of a checkpoint: Transformer Engine's own form of it is a pickle. Touches the layers' extra state alone, in
memory. Its Transformer Engine half: not run.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.fp8_utils import get_fp8_recipe
from megatron.core.utils import make_sharded_tensor_for_checkpoint
from torch import Tensor

from nemo_disco.policy.model import PolicyModel

# Of each direction: how many numbers a layer scales (operands and result; the gradients of these).
_SCALED = {"fwd": 3, "bwd": 2}


def sharded_scales(chunk: PolicyModel) -> dict[str, Any]:
    """megatron's sharded tensors, one on all ranks (their maxima are reduced over these); empty where nothing was
    scaled yet. Copies on the host."""
    found = {}
    for key, layer in _layers(chunk):
        state = _state(layer)
        for name in state:
            found[f"{key}.{name}"] = make_sharded_tensor_for_checkpoint(state[name], f"fp8.{key}.{name}")
    return found


def loadable_scales(chunk: PolicyModel) -> dict[str, Any]:
    """The tensors of `sharded_scales`, to be read into."""
    history = chunk.config.fp8_amax_history_len
    found = {}
    for key, _ in _layers(chunk):
        for direction, count in _SCALED.items():
            for name, shape in ((f"scale_{direction}", (count,)), (f"amax_history_{direction}", (history, count))):
                found[f"{key}.{name}"] = make_sharded_tensor_for_checkpoint(torch.empty(shape), f"fp8.{key}.{name}")
    return found


def load_scales(chunk: PolicyModel, state: dict[str, Tensor]) -> None:
    """Give every layer what was read."""
    recipe = get_fp8_recipe(chunk.config)
    names = [f"{kind}_{direction}" for direction in _SCALED for kind in ("scale", "amax_history")]
    for key, layer in _layers(chunk):
        said = {"recipe": recipe, "extra_fp8_variables": {"num_gemms": 1}}
        said |= {name: state[f"{key}.{name}"].cpu() for name in names}
        layer.set_extra_state(torch.frombuffer(bytearray(pickle.dumps(said)), dtype=torch.uint8))


def _layers(chunk: PolicyModel) -> Iterator[tuple[str, Any]]:
    """Transformer Engine's linear layers, under names that are the same at every layout."""
    for layer in chunk.decoder.layers:
        for name, module in layer.named_modules():
            if hasattr(module, "fp8_meta") and isinstance(getattr(module, "weight", None), Tensor):
                yield f"{layer.layer_number}.{name}", module


def _state(layer: Any) -> dict[str, Tensor]:
    """What Transformer Engine would save of a layer: bytes that it has just made of its own tensors."""
    packed = layer.get_extra_state()
    if packed is None or packed.numel() == 0:
        return {}
    state = pickle.loads(packed.cpu().numpy().tobytes())  # from this process's memory
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}
