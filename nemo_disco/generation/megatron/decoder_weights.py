"""Weights of the policy's network that the decoder computes with, and refusal of a network with other parts.

The decoder does the arithmetic of megatron's modules itself. To make sure that it leaves none out, each parameter,
module and setting of the network must be in the tables below.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch.nn.functional as F
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from torch import Tensor
from torch.nn import Module

from nemo_disco.models.architecture import LAYER
from nemo_disco.policy.model import PolicyModel
from nemo_disco.runtime.errors import UserError

# Modules that decoder.py computes, with their submodules.
_MODEL: dict[str, Any] = {
    "embedding": {"word_embeddings": None, "embedding_dropout": None},
    "rotary_pos_emb": None,  # unused: the angles are PolicyModel.rope_angles
    "decoder": {"layers": None, "final_layernorm": None},
    "output_layer": None,
}
_LAYER: dict[str, Any] = {
    "input_layernorm": None,
    "self_attention": dict.fromkeys(["linear_qkv", "q_layernorm", "k_layernorm", "core_attention", "linear_proj"]),
    "pre_mlp_layernorm": None,
    "mlp": dict.fromkeys(["linear_fc1", "activation_func", "linear_fc2"]),
}
# Settings that decoder.py assumes, by their names in megatron-core's TransformerConfig.
_SETTINGS: dict[str, Any] = {
    "normalization": "RMSNorm",
    "layernorm_zero_centered_gamma": False,
    "qk_l2_norm": False,
    "gated_linear_unit": True,
    "activation_func": F.silu,
    "activation_func_clamp_value": None,
    "glu_linear_offset": 0.0,
    "rotary_interleaved": False,
    "no_rope_freq": None,
    "window_size": None,
    "softmax_scale": None,
    "softmax_type": "vanilla",
    "attention_output_gate": False,
    "apply_residual_connection_post_layernorm": False,
}


@dataclass(frozen=True)
class LayerWeights:
    """One layer's parameters on this rank: h hidden size, d head size, f the MLP's width. The rows of qkv and gate_up
    and the columns of projection and down are this tensor-parallel rank's share.

    attention_norm, mlp_norm [h]; qkv [(heads + 2 groups) d, h], qkv_bias [(heads + 2 groups) d]; query_norm, key_norm
    [d], the same for each head; projection [h, heads d]; gate_up [2 f, h]; down [h, f].
    """

    attention_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    query_norm: Tensor | None
    key_norm: Tensor | None
    projection: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor

    @classmethod
    def from_layer(cls, layer: Any) -> LayerWeights:
        """The weights of a megatron TransformerLayer, by their role in it, for any implementation of its modules."""
        parameters: dict[str | None, Any] = dict(layer.named_parameters())
        tensors: dict[str, Any] = {}
        for role in (field.name for field in fields(cls)):
            tensors[role] = parameters.get(LAYER[role].name, parameters.get(LAYER[role].local_name))
        return cls(**tensors)

    def tensors(self) -> Iterator[Tensor]:
        yield from (t for f in fields(self) if (t := getattr(self, f.name)) is not None)


def decoder_weights(chunks: Sequence[PolicyModel]) -> list[list[LayerWeights]]:
    """The weights of each chunk's layers. Raises UserError naming a module, parameter or setting not in the tables."""
    config = chunks[0].config
    for name, expected in _SETTINGS.items():
        if (value := getattr(config, name, expected)) != expected:
            raise _refusal(f"{name}={getattr(value, '__name__', value)}")
    if unknown := [name for chunk in chunks for name in _unknown_modules(chunk)]:
        raise _refusal(f"the module {unknown[0]}")
    layers = [[LayerWeights.from_layer(layer) for layer in chunk.decoder.layers] for chunk in chunks]
    for chunk, weights in zip(chunks, layers, strict=True):
        decoded_ids = {id(t) for layer in weights for t in layer.tensors()}
        if chunk.pre_process:
            decoded_ids.add(id(chunk.embedding.word_embeddings.weight))
        if chunk.post_process:
            decoded_ids |= {id(chunk.decoder.final_layernorm.weight), id(chunk.output_weight())}
        for name, parameter in chunk.named_parameters():
            if id(parameter) not in decoded_ids:
                raise _refusal(f"the parameter {name}")
    return layers


def _unknown_modules(chunk: PolicyModel) -> Iterator[str]:
    yield from _unknown_children(chunk, _MODEL, "")
    for i, layer in enumerate(chunk.decoder.layers):
        yield from _unknown_children(layer, _LAYER, f"decoder.layers.{i}.")


def _unknown_children(module: Module, table: dict[str, Any], prefix: str) -> Iterator[str]:
    for name, child in module.named_children():
        if name not in table:
            if not isinstance(child, IdentityOp | IdentityFuncOp):
                yield prefix + name
        elif table[name] is not None:
            yield from _unknown_children(child, table[name], f"{prefix}{name}.")


def _refusal(part: str) -> UserError:
    return UserError(
        f"generation.engine=megatron does not compute {part} of this network, so it would sample from a different "
        "network; use generation=vllm"
    )
