"""The policy's network: megatron-core's GPTModel, ending in log-probs of chosen tokens instead of logits.

Touches megatron-core alone. The layer spec is the local one (no Transformer Engine) with our packed core attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from torch import Tensor

from nemo_disco.policy.attention import PackedCausalAttention
from nemo_disco.policy.log_probs import token_log_probs


@dataclass(frozen=True)
class Targets:
    """Which log-probs a forward pass returns.

    rows [n]: positions in the micro-batch whose next token is a response token; tokens [n]: that next token.
    temperature: what the logits are divided by. entropies: also return the entropy at each row.
    """

    rows: Tensor
    tokens: Tensor
    temperature: float
    entropies: bool = False


class RMSNorm(torch.nn.RMSNorm):
    """torch's, with what megatron asks of a norm: its constructor, and the mark by which gradients are summed under
    sequence parallelism (the stock local norm refuses it)."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def local_layer_spec(config: Any, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage, from modules that run on any device."""
    layer = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.qk_layernorm)
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = PackedCausalAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=RMSNorm)


class PolicyModel(GPTModel):  # type: ignore[misc]
    """GPTModel on packed micro-batches. Full logits never exist.

    `model(input_ids [1, S], position_ids [1, S], None, packed_seq_params=PackedSequences, labels=Targets)` returns on
    the last pipeline stage [n] log-probs, or [2, n] log-probs and entropies; on the others the hidden states [S, 1, h].
    """

    def __init__(self, *, true_vocab_size: int, inv_freq: Tensor, **kwargs: Any) -> None:
        """true_vocab_size: without the rows that pad the vocabulary to the TP size. inv_freq [d/2]: rope's angles a
        position, float32, as transformers computes them (so that every scaling that it knows is the same here)."""
        super().__init__(position_embedding_type="rope", **kwargs)
        self.true_vocab_size = true_vocab_size
        self.inv_freq = inv_freq.to(torch.cuda.current_device())

    def _preprocess(
        self, input_ids: Tensor, position_ids: Tensor, decoder_input: Tensor | None = None, **_: Any
    ) -> tuple[Tensor | None, ...]:
        if decoder_input is None and self.pre_process:
            decoder_input = self.embedding(input_ids=input_ids, position_ids=position_ids)
        return decoder_input, self.rope_angles(position_ids[0]), None, None, None, None

    def rope_angles(self, positions: Tensor) -> Tensor:
        """[S] positions -> [S, 1, 1, d] angles, float32."""
        angles = torch.outer(positions.float(), self.inv_freq)
        return torch.cat([angles, angles], dim=-1)[:, None, None, :]

    def output_weight(self) -> Tensor:
        """[v_local, h] this rank's rows of the output embedding."""
        tied = self.share_embeddings_and_output_weights
        weight: Tensor = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        return weight

    def _postprocess(self, hidden_states: Tensor, labels: Targets | None = None, **kwargs: Any) -> Tensor:
        if not self.post_process:
            return hidden_states
        if labels is None:
            logits: Tensor = super()._postprocess(hidden_states, labels=None, **kwargs)
            return logits
        group = self.pg_collection.tp
        # token_log_probs gives each TP rank its own share of d hidden; these two sum the shares in backward.
        if self.config.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(hidden_states, group=group)
        else:
            hidden_states = copy_to_tensor_model_parallel_region(hidden_states, group=group)
        weight = self.output_weight()
        log_probs, entropies = token_log_probs(
            hidden_states.squeeze(1).index_select(0, labels.rows),
            weight,
            labels.tokens,
            temperature=labels.temperature,
            tp_group=group if group.size() > 1 else None,
            vocab_start=group.rank() * weight.shape[0],
            vocab_size=self.true_vocab_size,
            entropies=labels.entropies,
        )
        return log_probs if entropies is None else torch.stack([log_probs, entropies])
