"""Stand-ins on a CPU for Transformer Engine's layers: a norm and a linear layer are one module with TE's parameters.

They test, without Transformer Engine, everything that depends on the module tree and on names (loading, export,
checkpoints, decoding) and FP8 rounding by its recipes.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor

from nemo_disco.models.architecture import Architecture
from nemo_disco.policy import layers


class Scaling:
    """FP8 scales of delayed scaling, and the history of maxima from which they come; equal on all ranks of a stage.

    scale [n]; amax_history [history, n], newest first.
    """

    def __init__(self, numbers: int, history: int) -> None:
        self.scale, self.amax_history = torch.ones(numbers), torch.zeros(history, numbers)

    def update(self, x: Tensor, largest: float) -> None:
        """Add the maximum of |x| to the history, and set the scales so that the history's maximum becomes `largest`."""
        self.amax_history = self.amax_history.roll(1, 0)
        maximum = x.detach().abs().max()
        dist.all_reduce(maximum, dist.ReduceOp.MAX, parallel_state.get_amax_reduction_group(with_context_parallel=True))
        self.amax_history[0] = maximum
        maxima = self.amax_history.amax(0)
        self.scale = torch.where(maxima > 0, largest / maxima, self.scale)

    def round(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x rounded to dtype under the present scale, in x's own dtype."""
        largest = torch.finfo(dtype).max
        return (x * self.scale[0]).clamp(-largest, largest).to(dtype).to(x.dtype) / self.scale[0]


class DelayedRounding(torch.autograd.Function):
    """Rounds a tensor, and in backward its gradient, by delayed scaling: under the scales of earlier passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, meta: dict[str, Scaling], update: bool) -> Tensor:
        ctx.meta = meta
        rounded = meta["scaling_fwd"].round(x, torch.float8_e4m3fn)
        if update:
            meta["scaling_fwd"].update(x, 448.0)
        return rounded

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        scaling = ctx.meta["scaling_bwd"]
        rounded: Tensor = scaling.round(gradient, torch.float8_e5m2)
        scaling.update(gradient, 57344.0)
        return rounded, None, None


# --- scaling without state ---

Rounding = Callable[[Tensor], Tensor]


def round_tensorwise(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x rounded by current scaling: one scale for the tensor, from its own largest number."""
    scale = torch.finfo(dtype).max / x.abs().max().clamp(min=1e-30)
    return (x * scale).to(dtype).to(x.dtype) / scale


def round_blockwise(x: Tensor, rows: int, columns: int) -> Tensor:
    """x rounded to e4m3 by blockwise scaling: one scale, a power of 2, for each block of `rows` by `columns`."""
    flat = x.reshape(-1, x.shape[-1])
    tall, wide = (-(-size // block) * block for size, block in zip(flat.shape, (rows, columns), strict=True))
    whole = F.pad(flat, (0, wide - flat.shape[1], 0, tall - flat.shape[0]))
    blocks = whole.view(tall // rows, rows, wide // columns, columns)
    scale = torch.exp2((448 / blocks.abs().amax((1, 3), keepdim=True).clamp(min=1e-30)).log2().floor())
    rounded = ((blocks * scale).to(torch.float8_e4m3fn).to(x.dtype) / scale).view(tall, wide)
    return rounded[: flat.shape[0], : flat.shape[1]].reshape(x.shape)


# For each recipe without state: the rounding of a layer's input, of its weight, and of the gradient of its output.
ROUNDINGS: dict[str, tuple[Rounding, Rounding, Rounding]] = {
    "tensorwise": (
        partial(round_tensorwise, dtype=torch.float8_e4m3fn),
        partial(round_tensorwise, dtype=torch.float8_e4m3fn),
        partial(round_tensorwise, dtype=torch.float8_e5m2),
    ),
    "blockwise": (
        partial(round_blockwise, rows=1, columns=128),
        partial(round_blockwise, rows=128, columns=128),
        partial(round_blockwise, rows=1, columns=128),
    ),
}
# The number of tokens in a pass must be a multiple of this, by recipe.
TOKEN_MULTIPLES = {"delayed": 16, "tensorwise": 16, "blockwise": 128}


class ForwardRounding(torch.autograd.Function):
    """Rounds a tensor; its gradient passes unchanged."""

    @staticmethod
    def forward(_: Any, x: Tensor, rounding: Rounding) -> Tensor:
        return rounding(x)

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class GradientRounding(torch.autograd.Function):
    """Passes a tensor unchanged; rounds its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounding: Rounding) -> Tensor:
        ctx.rounding = rounding
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.rounding(gradient), None


class NormLinear(ColumnParallelLinear):  # type: ignore[misc]
    """RMSNorm, then a linear layer, with the parameters of transformer_engine.pytorch.LayerNormLinear."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size, dtype=config.params_dtype))
        self.eps, self.history = config.layernorm_epsilon, config.fp8_amax_history_len
        self.recipe = config.fp8_recipe if config.fp8 else None
        self.fp8_meta: dict[str, Any] = {}

    def init_fp8_meta_tensors(self) -> None:
        self.fp8_meta["recipe"] = self.recipe
        if self.recipe == "delayed":
            self.fp8_meta |= {"scaling_fwd": Scaling(3, self.history), "scaling_bwd": Scaling(2, self.history)}

    def get_extra_state(self) -> Tensor:
        """The FP8 state, packed as by transformer_engine/pytorch/module/base.py at v2.11; empty before an FP8 pass."""
        if not self.fp8_meta:
            return torch.empty(0, dtype=torch.uint8)
        tensors = {
            f"{name}_{key}": getattr(self.fp8_meta[f"scaling_{key}"], name)
            for key in ("fwd", "bwd")
            for name in ("scale", "amax_history")
            if f"scaling_{key}" in self.fp8_meta
        }
        packed = pickle.dumps({"recipe": None, **tensors, "extra_fp8_variables": {"num_gemms": 1}})
        return torch.frombuffer(bytearray(packed), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        if state.numel() == 0:
            return
        content = pickle.loads(state.numpy().tobytes())
        assert content["extra_fp8_variables"]["num_gemms"] == 1 and "recipe" in content
        self.init_fp8_meta_tensors()
        for key in ("fwd", "bwd"):
            scaling = self.fp8_meta[f"scaling_{key}"]
            scaling.scale.copy_(content[f"scale_{key}"])
            scaling.amax_history.copy_(content[f"amax_history_{key}"])

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        x = F.rms_norm(x, x.shape[-1:], self.layer_norm_weight, self.eps)
        if self.recipe is None:
            return super().forward(x, *args, **kwargs)
        multiple = TOKEN_MULTIPLES[self.recipe]
        assert len(x) % multiple == 0, f"{self.recipe} scaling needs a multiple of {multiple} tokens, not {len(x)}"
        if not self.fp8_meta:
            self.init_fp8_meta_tensors()
        if self.recipe == "delayed":
            x = DelayedRounding.apply(x, self.fp8_meta, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
            return super().forward(x, *args, **kwargs)
        of_input, of_weight, of_gradient = ROUNDINGS[self.recipe]
        x = ForwardRounding.apply(x, of_input)  # type: ignore[no-untyped-call]
        weight = ForwardRounding.apply(self.weight, of_weight)  # type: ignore[no-untyped-call]
        out, bias = super().forward(x, weight, *args, **kwargs)
        return GradientRounding.apply(out, of_gradient), bias  # type: ignore[no-untyped-call]


def fused_layer(config: Any, architecture: Architecture) -> tuple[Any, type]:
    """Replacement of layers._transformer_engine_layer: (the layer's specification, the class of the final norm).

    The layer's own norms do nothing, since its linear layers are NormLinear.
    """
    layer, norm = layers._local_layer(config, architecture)
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = IdentityOp
    if "attention_norm" in architecture.norms:
        layer.submodules.self_attention.submodules.linear_qkv = NormLinear
    if "mlp_norm" in architecture.norms:
        layer.submodules.mlp.submodules.linear_fc1 = NormLinear
    layer.submodules.sharded_state_dict_keys_map = {}
    return layer, norm
