"""The policy's layers, in two implementations: local modules for any device, and Transformer Engine's on CUDA.

Uses megatron-core alone. Both have the same tensors under the same names in a checkpoint. The parts for CUDA and for
Transformer Engine: not run.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from torch import Tensor

from nemo_disco.config.schema import ModelConfig
from nemo_disco.models.architecture import Architecture
from nemo_disco.policy.attention import PackedCausalAttention
from nemo_disco.policy.experts import PolicyExperts, PolicyRouter
from nemo_disco.policy.modules import (
    ColumnLinear,
    GatedActivation,
    PolicyAttention,
    PolicyLayer,
    PolicyLayerSubmodules,
    PolicyMLP,
    RowLinear,
    with_bias,
    with_submodules,
)
from nemo_disco.policy.norms import RMSNorm, wide_norm
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


def layer_spec(
    config: Any, architecture: Architecture, transformer_engine: bool, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """The specification of this pipeline stage's layers."""
    layer, norm = (_transformer_engine_layer if transformer_engine else _local_layer)(config, architecture)
    attention, mlp = layer.submodules.self_attention.submodules, layer.submodules.mlp.submodules
    layer.module, layer.submodules.self_attention.module = PolicyLayer, PolicyAttention
    output_norms = {role: norm for role in ("attention_output_norm", "mlp_output_norm") if role in architecture.norms}
    layer.submodules = PolicyLayerSubmodules(**vars(layer.submodules), **output_norms)
    if architecture.wide_qk_norm:
        attention.q_layernorm = wide_norm(config.num_attention_heads)
        attention.k_layernorm = wide_norm(config.num_query_groups)
    attention.linear_proj = with_bias(attention.linear_proj, architecture.projection_bias)
    if architecture.experts is not None:
        mlp.router = partial(PolicyRouter, normalised=architecture.normalised_routing)
        layer.submodules.mlp, mlp = with_submodules(PolicyExperts, mlp), mlp.experts.submodules
    mlp.linear_fc1, mlp.linear_fc2 = (with_bias(x, architecture.mlp_bias) for x in (mlp.linear_fc1, mlp.linear_fc2))
    if not config.bias_activation_fusion:
        # Despite its name, this is how megatron's MLP takes any module as its activation.
        config.use_te_activation_func = True
        mlp.activation_func = GatedActivation
        if architecture.experts is None:
            layer.submodules.mlp = with_submodules(PolicyMLP, mlp)
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=norm)


# --- local ---


def _local_layer(config: Any, architecture: Architecture) -> tuple[ModuleSpec, type]:
    layer = gpt_layer_specs.get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, normalization="RMSNorm", qk_layernorm=config.qk_layernorm
    )
    layer.submodules.input_layernorm = RMSNorm if "attention_norm" in architecture.norms else IdentityOp
    layer.submodules.pre_mlp_layernorm = RMSNorm if "mlp_norm" in architecture.norms else IdentityOp
    attention, mlp = layer.submodules.self_attention.submodules, layer.submodules.mlp.submodules
    if config.num_moe_experts is not None:
        mlp = mlp.experts.submodules
        layer.submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.")  # Transformer Engine fuses it not either
    attention.core_attention = PackedCausalAttention
    attention.linear_qkv = mlp.linear_fc1 = ColumnLinear
    attention.linear_proj = mlp.linear_fc2 = RowLinear
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return layer, RMSNorm


# --- Transformer Engine ---


def _transformer_engine_layer(config: Any, architecture: Architecture) -> tuple[ModuleSpec, type]:
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm

    if config.window_size is not None and config.context_parallel_size > 1:
        raise UserError(
            f"model.context_parallel_size={config.context_parallel_size}: Transformer Engine's attention has no "
            "sliding window there; set it to 1, or model.transformer_engine to false"
        )
    layer = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=config.num_moe_experts is not None,
        qk_layernorm=config.qk_layernorm,
    )
    attention, mlp = layer.submodules.self_attention.submodules, layer.submodules.mlp.submodules
    attention.core_attention = _transformer_engine_attention()
    if "attention_norm" not in architecture.norms:  # with it, it is part of the linear layer
        attention.linear_qkv = TEColumnParallelLinear
    if "mlp_norm" not in architecture.norms:
        mlp.linear_fc1 = TEColumnParallelLinear
    return layer, TENorm


def _transformer_engine_attention() -> type:
    """Transformer Engine's attention on packed sequences ("thd"), with context parallelism.

    Inputs and output stay [S, 1, ...]; queries and keys arrive with rope applied.
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
