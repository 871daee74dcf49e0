"""The state of FP8 delayed scaling as tensors of a checkpoint: each layer's scales and its history of maxima.

Transformer Engine itself saves this state as a pickle. Touches only the layers' extra state, in memory. The calls of
Transformer Engine: not run.
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

# Number of tensors that a layer scales in each pass.
_SCALED = {"fwd": 3, "bwd": 2}


def sharded_scales(chunk: PolicyModel) -> dict[str, Any]:
    """Copies of the state on the host, as megatron's sharded tensors; empty before the first FP8 pass. All ranks have
    the same state, since they reduce their maxima."""
    return {
        f"{key}.{name}": make_sharded_tensor_for_checkpoint(tensor, f"fp8.{key}.{name}")
        for key, layer in _layers(chunk)
        for name, tensor in _state(layer).items()
    }


def loadable_scales(chunk: PolicyModel) -> dict[str, Any]:
    """Uninitialised tensors in place of those of `sharded_scales`, to be filled from a checkpoint."""
    return {
        f"{key}.{name}": make_sharded_tensor_for_checkpoint(torch.empty(shape), f"fp8.{key}.{name}")
        for key, _ in _layers(chunk)
        for name, shape in _shapes(chunk).items()
    }


def load_scales(chunk: PolicyModel, state: dict[str, Tensor]) -> None:
    """Set every layer's scales to the loaded tensors of `loadable_scales`."""
    recipe = get_fp8_recipe(chunk.config)
    for key, layer in _layers(chunk):
        extra = {"recipe": recipe, "extra_fp8_variables": {"num_gemms": 1}}
        extra |= {name: state[f"{key}.{name}"].cpu() for name in _shapes(chunk)}
        layer.set_extra_state(torch.frombuffer(bytearray(pickle.dumps(extra)), dtype=torch.uint8))


def _shapes(chunk: PolicyModel) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of each layer's state, by name."""
    history = chunk.config.fp8_amax_history_len
    scales = {f"scale_{direction}": (count,) for direction, count in _SCALED.items()}
    return scales | {f"amax_history_{direction}": (history, count) for direction, count in _SCALED.items()}


def _layers(chunk: PolicyModel) -> Iterator[tuple[str, Any]]:
    """Transformer Engine's linear layers, with names that are the same at every layout."""
    for layer in chunk.decoder.layers:
        for name, module in layer.named_modules():
            if hasattr(module, "fp8_meta") and isinstance(getattr(module, "weight", None), Tensor):
                yield f"{layer.layer_number}.{name}", module


def _state(layer: Any) -> dict[str, Tensor]:
    """The tensors in the state that Transformer Engine would save for a layer."""
    packed = layer.get_extra_state()
    if packed is None or packed.numel() == 0:
        return {}
    state = pickle.loads(packed.cpu().numpy().tobytes())  # safe: Transformer Engine has just made it in this process
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}
