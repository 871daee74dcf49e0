"""The forward pass of a layer and of its modules, the same for training and for decoding: megatron-core's modules,
without the parts of their forward passes that serve no model here.

Whether attention is over a packed micro-batch or over a cache of keys and values is decided by the object that is
passed as packed_seq_params.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import (
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from nemo_disco.policy.attention import layer_window
from nemo_disco.policy.compiled import compiled

Output = tuple[Tensor, Tensor | None]  # a linear layer's output, and its bias if that is still to be added


class CachedAttention(ABC):
    """Attention of a decoding step: passed through the network in place of a packed micro-batch's sequences."""

    @abstractmethod
    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None
    ) -> Tensor:
        """Output [S, 1, heads d] of layer `layer` (from 1), whose queries are [S, 1, heads, d] and whose new keys and
        values [S, 1, groups, d]. window: how many tokens a token sees, itself included; None for all."""


@dataclass
class PolicyLayerSubmodules(TransformerLayerSubmodules):  # type: ignore[misc]
    """megatron's, with norms of what attention and the MLP return."""

    attention_output_norm: Any = IdentityOp
    mlp_output_norm: Any = IdentityOp


class PolicyLayer(TransformerLayer):  # type: ignore[misc]
    """A megatron layer: attention and MLP, each with a norm before it, after it or both, and added to its input."""

    def __init__(self, config: Any, submodules: PolicyLayerSubmodules, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, submodules, *args, **kwargs)
        sizes = {"config": config, "hidden_size": config.hidden_size, "eps": config.layernorm_epsilon}
        self.attention_output_norm = build_module(submodules.attention_output_norm, **sizes)
        self.mlp_output_norm = build_module(submodules.mlp_output_norm, **sizes)

    def forward(self, hidden_states: Tensor, *_: Any, rotary_pos_emb: Tensor, packed_seq_params: Any, **__: Any) -> Any:
        """(output [S, 1, h], None), as megatron's block expects it. rotary_pos_emb: of Rope.at."""
        x = hidden_states
        attention = self.self_attention(self.input_layernorm(x), rotary_pos_emb, packed_seq_params)
        x = x + self.attention_output_norm(_with_bias(attention))  # there is no dropout
        mlp = self.mlp(self.pre_mlp_layernorm(x), sequences=packed_seq_params)
        return x + self.mlp_output_norm(_with_bias(mlp)), None


def _with_bias(output: Output) -> Tensor:
    value, bias = output
    return value if bias is None else value + bias


class PolicyAttention(SelfAttention):  # type: ignore[misc]
    """Self-attention over a packed micro-batch, or over the cache of a decoding step."""

    rope: Callable[[Tensor, Tensor], Tensor]  # the model's Rope, or no_rope; set by PolicyModel

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scale = self.config.softmax_scale or self.config.kv_channels**-0.5
        self.window = layer_window(self.config, self.layer_number)

    def forward(self, hidden_states: Tensor, rotation: Tensor, sequences: PackedSeqParams | CachedAttention) -> Output:
        """The output [S, 1, h], and a bias. rotation: of Rope.at."""
        query, key, value = self._rotated(self.linear_qkv(hidden_states)[0], rotation)
        if isinstance(sequences, CachedAttention):
            context = sequences.attend(self.layer_number, query, key, value, scale=self.scale, window=self.window)
        else:
            recomputed = self.checkpoint_core_attention and self.training
            attend = self._checkpointed_attention_forward if recomputed else self.core_attention
            options = {"attn_mask_type": self.attn_mask_type, "attention_bias": None, "packed_seq_params": sequences}
            context = attend(query, key, value, None, **options)
        output: Output = self.linear_proj(context)
        return output

    def _rotated(self, qkv: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [S, 1, heads, d], keys and values [S, 1, groups, d] of qkv [S, 1, (heads + 2 groups) d], in which a
        group's queries, key and value are side by side, as in megatron's weight."""
        groups = self.num_query_groups_per_partition
        queries = self.num_attention_heads_per_partition // groups
        by_group = qkv.view(*qkv.shape[:2], groups, queries + 2, self.hidden_size_per_attention_head)
        both, value = by_group[..., :-1, :], by_group[..., -1, :]
        normed = not isinstance(self.q_layernorm, IdentityOp)
        if not (normed or torch.is_grad_enabled()):  # faster for few tokens; for backward it would keep them twice
            query, key = torch.split(self.rope(both, rotation), [queries, 1], dim=3)
            return query.flatten(2, 3), key.flatten(2, 3), value
        query, key = torch.split(both, [queries, 1], dim=3)
        if normed:
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        return self.rope(query, rotation).flatten(2, 3), self.rope(key, rotation).flatten(2, 3), value


class PolicyMLP(MLP):  # type: ignore[misc]
    """megatron's MLP: a matrix of gates and values, their activation, and a matrix back."""

    def forward(self, hidden_states: Tensor, **_: Any) -> Output:
        """The output [S, 1, h], and a bias."""
        x, bias = self.linear_fc1(hidden_states)
        output: Output = self.linear_fc2(self.activation_func(x if bias is None else x + bias))
        return output


def with_submodules(module: type, submodules: Any) -> type:
    """The class of an MLP with its submodules: in a ModuleSpec, megatron warns of an MLP that is not its own."""

    class Bound(module):  # type: ignore[misc]
        def __init__(self, config: Any) -> None:
            super().__init__(config, submodules)

    return Bound


@contextmanager
def sequence_parallel_off(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Context in which the chunks' modules take and return all tokens on every tensor-parallel rank."""
    modules = [module for chunk in chunks for module in chunk.modules()]
    owners: list[Any] = [*modules, *{id(config): config for config in (m.config for m in chunks)}.values()]
    names = ("sequence_parallel", "reduce_scatter_embeddings")
    on = [(owner, name) for owner in owners for name in names if getattr(owner, name, None) is True]
    try:
        for owner, name in on:
            setattr(owner, name, False)
        yield
    finally:
        for owner, name in on:
            setattr(owner, name, True)


# --- modules of the local layers ---


class ColumnLinear(ColumnParallelLinear):  # type: ignore[misc]
    """megatron's linear layer whose rows are split. Without gradients it is the matrix product alone: megatron's
    autograd functions cost more than the product of a small batch."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Output:
        """x [S, 1, h] -> [S, 1, this rank's rows]."""
        if torch.is_grad_enabled() or self.sequence_parallel:
            output: Output = super().forward(x, *args, **kwargs)
            return output
        product = torch.matmul(x, self.weight.t())
        if self.bias is None or self.skip_bias_add:
            return product, self.bias
        return product.add_(self.bias), None


class RowLinear(RowParallelLinear):  # type: ignore[misc]
    """megatron's linear layer whose columns are split; see ColumnLinear. Its bias is the caller's to add."""

    def forward(self, x: Tensor) -> Output:
        """x [S, 1, this rank's columns] -> [S, 1, h]."""
        if torch.is_grad_enabled() or self.sequence_parallel:
            output: Output = super().forward(x)
            return output
        product = torch.matmul(x, self.weight.t())
        if self.tp_group.size() > 1 and not self.explicit_expert_comm:  # of experts, the dispatcher adds up
            product = reduce_from_tensor_model_parallel_region(product, group=self.tp_group)
        return product, self.bias


def with_bias(linear: type, bias: bool) -> type:
    """The class of a linear layer that has a bias or none, whatever megatron's setting for all of them says."""

    class Linear(linear):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "bias": bias})

    return Linear


@compiled
def gated(x: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """activation(gate) * up [..., f]. x [..., 2 f]: gate and up, one after the other."""
    gate, up = x.chunk(2, dim=-1)
    return activation(gate) * up


class GatedActivation(torch.nn.Module):
    """The MLP's activation, as one kernel on CUDA that keeps only its input for backward."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.activation = config.activation_func

    def forward(self, x: Tensor) -> Tensor:
        return gated(x, self.activation)

    def sharded_state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        """Empty: there is no state."""
        return {}
