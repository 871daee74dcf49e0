"""Forward pass of the policy's own weights with a KV cache, at any TP x PP, for the megatron engine.

Reads megatron's parameters where they lie (no copy, no refit) and does the arithmetic of their modules on a batch of
rows. Knows nothing of sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nemo_disco.data.packing import round_up
from nemo_disco.generation.megatron.decoder_weights import LayerWeights, decoder_weights
from nemo_disco.policy.model import PolicyModel
from nemo_disco.policy.parallel import Ranks

# A full cache grows by this many tokens a row, or by half if that is more. Capacities are multiples of GROWTH: in every
# layer, CUDA's attention copies a mask whose rows do not begin at a multiple of 8 numbers.
GROWTH = 64
# Without cuDNN, which SDPA prefers on Hopper: it builds a plan (tens of milliseconds) for each new number of keys, and
# plain decoding adds one key at every token. benchmarks/gpu measures both.
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Cache:
    """Keys and values of B rows: for each layer a pair of [B, groups, capacity, d], which grow on demand."""

    def __init__(self, layers: int, shape: tuple[int, int, int], like: Tensor) -> None:
        rows, groups, head_size = shape
        self.pairs = [[like.new_empty(rows, groups, 0, head_size) for _ in "kv"] for _ in range(layers)]

    @property
    def capacity(self) -> int:
        return self.pairs[0][0].shape[2] if self.pairs else 0

    def reserve(self, tokens: int, max_tokens: int) -> None:
        """Make room for `tokens` tokens a row. max_tokens: the most that a row will ever have."""
        if tokens <= self.capacity:
            return
        more = round_up(min(max_tokens, max(tokens + GROWTH, self.capacity * 3 // 2)), GROWTH) - self.capacity
        for pair in self.pairs:
            for i, x in enumerate(pair):
                pair[i] = torch.cat([x, x.new_zeros(*x.shape[:2], more, x.shape[3])], dim=2)

    def select(self, rows: Tensor) -> None:
        """Keep the rows at these indices, in this order; an index may repeat."""
        for pair in self.pairs:
            for i, x in enumerate(pair):
                pair[i] = x.index_select(0, rows)


class Decoder:
    """Forward pass of the layers of this rank, in the order in which the whole model runs them."""

    def __init__(self, chunks: Sequence[PolicyModel], ranks: Ranks, tensor_group: Any, pipeline_group: Any) -> None:
        """Raises UserError that names a part of the network that the decoder does not compute."""
        self.chunks, self.ranks = chunks, ranks
        self.layers = decoder_weights(chunks)
        self.tensor_group = tensor_group if tensor_group.size() > 1 else None
        self.pipeline_group = pipeline_group
        config = chunks[0].config
        self.eps, self.head_size = config.layernorm_epsilon, config.kv_channels
        self.groups = config.num_query_groups // ranks.tensor_size
        self.heads_per_group = config.num_attention_heads // config.num_query_groups
        self.hidden = config.hidden_size
        self.scale = self.head_size**-0.5
        self.dtype: torch.dtype = config.params_dtype

    def new_cache(self, rows: int) -> Cache:
        layers = sum(map(len, self.layers))
        like = next(self.chunks[0].parameters())
        return Cache(layers, (rows, self.groups, self.head_size), like)

    def forward(
        self, tokens: Tensor, positions: Tensor, cache: Cache, start: int | Tensor, mask: Tensor | None
    ) -> Tensor | None:
        """Logits [B, V] after the last of tokens [B, t], on the last pipeline stage; None on the others.

        positions [B, t]: for rope. start: the column of the cache for the first token. mask: additive,
        [B, 1, t or 1, start + t]; None for a causal mask (t > 1) or none (t = 1). start may be a tensor [1] if t = 1:
        the mask then has the width of the whole cache, and no shape depends on start.
        """
        with sdpa_kernel(BACKENDS):
            return self._forward(tokens, positions, cache, start, mask)

    def _forward(
        self, tokens: Tensor, positions: Tensor, cache: Cache, start: int | Tensor, mask: Tensor | None
    ) -> Tensor | None:
        angles = self.chunks[0].rope_angles(positions.flatten()).view(*positions.shape, 1, -1)
        rope = angles.cos().to(self.dtype), angles.sin().to(self.dtype)
        x: Tensor | None = None
        layer_index = 0
        for chunk, layers in zip(self.chunks, self.layers, strict=True):
            x = self._embed(chunk, tokens) if chunk.pre_process else self._receive(tokens)
            for layer in layers:
                x = x + self._attention(layer, x, rope, cache.pairs[layer_index], start, mask)
                x = x + self._mlp(layer, x)
                layer_index += 1
            if chunk.post_process:
                return self._logits(chunk, x[:, -1])
            self._send(x)
        return None

    # --- the modules' arithmetic ---

    def _embed(self, chunk: PolicyModel, tokens: Tensor) -> Tensor:
        weight: Tensor = chunk.embedding.word_embeddings.weight
        if self.tensor_group is None:
            return F.embedding(tokens, weight)
        local = tokens - self.ranks.tensor * weight.shape[0]
        foreign = (local < 0) | (local >= weight.shape[0])
        x = F.embedding(local.masked_fill(foreign, 0), weight).masked_fill(foreign[..., None], 0.0)
        return self._reduce(x)

    def _attention(
        self,
        layer: LayerWeights,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        pair: list[Tensor],
        start: int | Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        rows, t = x.shape[:2]
        x = F.rms_norm(x, (self.hidden,), layer.attention_norm, self.eps)
        qkv = F.linear(x, layer.qkv, layer.qkv_bias)
        # megatron keeps each group's queries, then its key, then its value together
        qkv = qkv.view(rows, t, self.groups, self.heads_per_group + 2, self.head_size)
        qk = _rotate(self._norm_heads(layer, qkv[..., :-1, :]), rope)
        keys, values = _store(pair, qk[..., -1, :].transpose(1, 2), qkv[..., -1, :].transpose(1, 2), start)
        query = qk[..., :-1, :].permute(0, 2, 3, 1, 4)  # [B, groups, heads per group, t, d]
        if t == 1:  # the heads of a group are queries of one key head
            out = F.scaled_dot_product_attention(
                query.reshape(rows, self.groups, self.heads_per_group, self.head_size),
                keys,
                values,
                attn_mask=mask,
                scale=self.scale,
            ).view(rows, 1, -1)
        else:
            out = F.scaled_dot_product_attention(
                query.reshape(rows, -1, t, self.head_size),
                keys,
                values,
                attn_mask=mask,
                is_causal=mask is None,
                scale=self.scale,
                enable_gqa=True,
            )
            out = out.transpose(1, 2).reshape(rows, t, -1)
        return self._reduce(F.linear(out, layer.projection))

    def _norm_heads(self, layer: LayerWeights, qk: Tensor) -> Tensor:
        """Apply Qwen3's norms to each head's query and each group's key. qk [B, t, groups, heads per group + 1, d]."""
        if layer.query_norm is None and layer.key_norm is None:
            return qk
        parts = ((qk[..., :-1, :], layer.query_norm), (qk[..., -1:, :], layer.key_norm))
        return torch.cat([x if w is None else F.rms_norm(x, (self.head_size,), w, self.eps) for x, w in parts], dim=-2)

    def _mlp(self, layer: LayerWeights, x: Tensor) -> Tensor:
        x = F.rms_norm(x, (self.hidden,), layer.mlp_norm, self.eps)
        gate, up = F.linear(x, layer.gate_up).chunk(2, dim=-1)
        return self._reduce(F.linear(F.silu(gate) * up, layer.down))

    def _logits(self, chunk: PolicyModel, x: Tensor) -> Tensor:
        x = F.rms_norm(x, (self.hidden,), chunk.decoder.final_layernorm.weight, self.eps)
        logits = F.linear(x, chunk.output_weight())
        if self.tensor_group is not None:
            shards = [torch.empty_like(logits) for _ in range(self.ranks.tensor_size)]
            dist.all_gather(shards, logits.contiguous(), group=self.tensor_group)
            logits = torch.cat(shards, dim=-1)
        logits = logits[:, : chunk.true_vocab_size]
        return logits if logits.dtype is torch.float64 else logits.float()

    # --- between ranks ---

    def _reduce(self, x: Tensor) -> Tensor:
        if self.tensor_group is not None:
            dist.all_reduce(x, group=self.tensor_group)
        return x

    def _neighbour(self, step: int) -> int:
        stage = (self.ranks.pipeline + step) % self.ranks.pipeline_size
        return dist.get_global_rank(self.pipeline_group, stage)

    def _send(self, x: Tensor) -> None:
        dist.send(x.contiguous(), dst=self._neighbour(+1), group=self.pipeline_group)

    def _receive(self, tokens: Tensor) -> Tensor:
        x = torch.empty(*tokens.shape, self.hidden, dtype=self.dtype, device=tokens.device)
        dist.recv(x, src=self._neighbour(-1), group=self.pipeline_group)
        return x

    def broadcast_last_stage(self, x: Tensor) -> Tensor:
        """Overwrite x on every pipeline stage with the last stage's x, and return it. A collective of the stages."""
        if self.ranks.pipeline_size > 1:
            source = dist.get_global_rank(self.pipeline_group, self.ranks.pipeline_size - 1)
            dist.broadcast(x, src=source, group=self.pipeline_group)
        return x


def _store(pair: list[Tensor], key: Tensor, value: Tensor, start: int | Tensor) -> tuple[Tensor, Tensor]:
    """Write a layer's new keys and values [B, groups, t, d] into the cache, and return all keys and values so far."""
    keys, values = pair
    if isinstance(start, Tensor):
        return keys.index_copy_(2, start, key), values.index_copy_(2, start, value)
    end = start + key.shape[2]
    keys[:, :, start:end], values[:, :, start:end] = key, value
    return keys[:, :, :end], values[:, :, :end]


def _rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Apply rope to x [B, t, groups, heads, d]. rope: cos and sin [B, t, 1, d]."""
    cos, sin = (r.unsqueeze(2) for r in rope)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
