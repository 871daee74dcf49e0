"""The policy's layers, in two implementations: local modules for any device, and Transformer Engine's on CUDA.

Uses megatron-core alone. Both have the same tensors under the same names in a checkpoint. The parts for CUDA and for
Transformer Engine: not run.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from torch import Tensor

from nemo_disco.config.schema import ModelConfig
from nemo_disco.policy.attention import PackedCausalAttention
from nemo_disco.policy.compiled import compile_rope, compiled
from nemo_disco.runtime.errors import UserError


def uses_transformer_engine(config: ModelConfig) -> bool:
    """True if the layers are Transformer Engine's. Raises UserError if a setting needs it and it is missing."""
    available = bool(gpt_layer_specs.HAVE_TE) and torch.cuda.is_available()
    needs = {
        "transformer_engine=true": config.transformer_engine,
        f"fp8={config.fp8}": config.fp8,
        "apply_rope_fusion=true": config.apply_rope_fusion,
        f"optim.moments_dtype={config.optim.moments_dtype}": config.optim.moments_dtype != "float32",
    }
    for setting in (key for key, needed in needs.items() if needed and not available):
        raise UserError(f"model.{setting} needs Transformer Engine and CUDA, which are not here: see nemo-disco doctor")
    return available if config.transformer_engine is None else config.transformer_engine


def layer_spec(config: Any, transformer_engine: bool, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The specification of this pipeline stage's layers."""
    layer, norm = _transformer_engine_layer(config) if transformer_engine else _local_layer(config)
    # megatron's own version would launch a dropout kernel, though dropout is 0.
    layer.submodules.self_attn_bda = layer.submodules.mlp_bda = residual_add
    if not config.bias_activation_fusion:
        assert config.activation_func is F.silu, "SwiGLU is the only activation that is built"
        # Despite its name, this is how megatron's MLP takes any module as its activation.
        config.use_te_activation_func = True
        layer.submodules.mlp.submodules.activation_func = SwiGLU
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=norm)


def residual_add(training: bool, fused: bool) -> Any:  # noqa: ARG001 - megatron's signature
    """Replacement for megatron's bias-dropout-add, without bias and dropout."""
    return lambda x_with_bias, residual, _: residual + x_with_bias[0]


@compiled
def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up [..., f]. x [..., 2 f]: gate and up, one after the other."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


class SwiGLU(torch.nn.Module):
    """The MLP's activation, as one kernel on CUDA that keeps only its input for backward."""

    def __init__(self, config: Any) -> None:  # noqa: ARG002 - megatron's signature
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return swiglu(x)

    def sharded_state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        """Empty: there is no state."""
        return {}


# --- local ---


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with megatron's constructor and its mark for summing gradients under sequence parallelism, which
    megatron's own local norm does not support."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def _local_layer(config: Any) -> tuple[ModuleSpec, type]:
    compile_rope()
    layer = gpt_layer_specs.get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.qk_layernorm)
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = PackedCausalAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return layer, RMSNorm


# --- Transformer Engine ---


def _transformer_engine_layer(config: Any) -> tuple[ModuleSpec, type]:
    from megatron.core.extensions.transformer_engine import TENorm

    layer = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    layer.submodules.self_attention.submodules.core_attention = _transformer_engine_attention()
    return layer, TENorm


def _transformer_engine_attention() -> type:
    """Transformer Engine's attention on packed sequences ("thd"), with context parallelism.

    Inputs and output stay [S, 1, ...]: megatron applies rope to the micro-batch as a whole, by each token's position.
    """
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    class PackedAttention(TEDotProductAttention):  # type: ignore[misc]
        def forward(
            self, query: Tensor, key: Tensor, value: Tensor, *_: Any, packed_seq_params: Any, **__: Any
        ) -> Tensor:
            q, k, v = (x.squeeze(1) for x in (query, key, value))
            kind = AttnMaskType.padding_causal
            out: Tensor = super().forward(q, k, v, None, kind, packed_seq_params=packed_seq_params.whole)
            return out.reshape(query.shape[0], 1, -1)

    return PackedAttention
