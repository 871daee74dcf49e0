"""Layers that hold their tensors as Transformer Engine's do (norm and linear are one module), from modules of a CPU.

What depends on the shape of the module tree and on names (loading, export, checkpoints, decoding) can be tested with
them where Transformer Engine is not.
"""

from __future__ import annotations

import pickle
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor

from nemo_disco.policy import layers


class Scaling:
    """One direction's scales and the maxima that they come from, newest first."""

    def __init__(self, numbers: int, history: int) -> None:
        self.scale, self.amax_history = torch.ones(numbers), torch.zeros(history, numbers)

    def seen(self, x: Tensor, largest: float) -> None:
        self.amax_history = self.amax_history.roll(1, 0)
        self.amax_history[0] = x.detach().abs().max()
        most = self.amax_history.amax(0)
        self.scale = torch.where(most > 0, largest / most, self.scale)

    def rounded(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        most = torch.finfo(dtype).max
        return (x * self.scale[0]).clamp(-most, most).to(dtype).to(x.dtype) / self.scale[0]


class Quantized(torch.autograd.Function):
    """What delayed scaling does to a number and to its gradient: rounded under the scale of the passes before."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, meta: dict[str, Scaling], learns: bool) -> Tensor:
        ctx.meta = meta
        rounded = meta["scaling_fwd"].rounded(x, torch.float8_e4m3fn)
        if learns:
            meta["scaling_fwd"].seen(x, 448.0)
        return rounded

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        scaling = ctx.meta["scaling_bwd"]
        rounded: Tensor = scaling.rounded(gradient, torch.float8_e5m2)
        scaling.seen(gradient, 57344.0)
        return rounded, None, None


class NormLinear(ColumnParallelLinear):  # type: ignore[misc]
    """RMSNorm, then a linear layer, with the parameters of transformer_engine.pytorch.LayerNormLinear."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size, dtype=config.params_dtype))
        self.eps, self.history = config.layernorm_epsilon, config.fp8_amax_history_len
        self.fp8 = config.fp8 is not None
        self.fp8_meta: dict[str, Any] = {}

    def init_fp8_meta_tensors(self) -> None:
        self.fp8_meta |= {"scaling_fwd": Scaling(3, self.history), "scaling_bwd": Scaling(2, self.history)}

    def get_extra_state(self) -> Tensor:
        """As transformer_engine/pytorch/module/base.py at v2.11 packs it: empty before the first FP8 pass."""
        if not self.fp8_meta:
            return torch.empty(0, dtype=torch.uint8)
        tensors = {
            f"{name}_{key}": getattr(self.fp8_meta[f"scaling_{key}"], name)
            for key in ("fwd", "bwd")
            for name in ("scale", "amax_history")
        }
        packed = pickle.dumps({"recipe": None, **tensors, "extra_fp8_variables": {"num_gemms": 1}})
        return torch.frombuffer(bytearray(packed), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        if state.numel() == 0:
            return
        said = pickle.loads(state.numpy().tobytes())
        assert said["extra_fp8_variables"]["num_gemms"] == 1 and "recipe" in said
        self.init_fp8_meta_tensors()
        for key in ("fwd", "bwd"):
            scaling = self.fp8_meta[f"scaling_{key}"]
            scaling.scale.copy_(said[f"scale_{key}"])
            scaling.amax_history.copy_(said[f"amax_history_{key}"])

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        x = F.rms_norm(x, x.shape[-1:], self.layer_norm_weight, self.eps)
        if self.fp8:
            if not self.fp8_meta:
                self.init_fp8_meta_tensors()
            x = Quantized.apply(x, self.fp8_meta, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
        return super().forward(x, *args, **kwargs)


def fused_layer(config: Any) -> tuple[Any, type]:
    """In place of layers._transformer_engine_layer: there the norms' own places are empty."""
    layer, norm = layers._local_layer(config)
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = IdentityOp
    layer.submodules.self_attention.submodules.linear_qkv = NormLinear
    layer.submodules.mlp.submodules.linear_fc1 = NormLinear
    layer.submodules.sharded_state_dict_keys_map = {}
    return layer, norm
