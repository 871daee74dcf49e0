"""Layers that hold their tensors as Transformer Engine's do (norm and linear are one module), from modules of a CPU.

What depends on the shape of the module tree and on names (loading, export, checkpoints, decoding) can be tested with
them where Transformer Engine is not.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor

from nemo_disco.policy import layers


class Scales(torch.nn.Module):
    """Stands for the state that Transformer Engine keeps beside its parameters."""

    def get_extra_state(self) -> Tensor:
        return torch.zeros(1)

    def set_extra_state(self, state: Tensor) -> None:
        assert isinstance(state, Tensor)


class NormLinear(ColumnParallelLinear):  # type: ignore[misc]
    """RMSNorm, then a linear layer, with the parameters of transformer_engine.pytorch.LayerNormLinear."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size, dtype=config.params_dtype))
        self.eps = config.layernorm_epsilon
        self.scales = Scales()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(F.rms_norm(x, x.shape[-1:], self.layer_norm_weight, self.eps), *args, **kwargs)


def fused_layer(config: Any) -> tuple[Any, type]:
    """In place of layers._transformer_engine_layer: there the norms' own places are empty."""
    layer, norm = layers._local_layer(config)
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = IdentityOp
    layer.submodules.self_attention.submodules.linear_qkv = NormLinear
    layer.submodules.mlp.submodules.linear_fc1 = NormLinear
    layer.submodules.sharded_state_dict_keys_map = {}
    return layer, norm
