"""Keys and values of the rows that the megatron engine decodes, and attention over them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_disco.data.packing import round_up
from nemo_disco.policy.attention import causal_mask
from nemo_disco.policy.modules import CachedAttention

# A full cache grows by this many tokens a row, or by half if that is more. Capacities are multiples of GROWTH: in every
# layer, CUDA's attention copies a mask whose rows do not begin at a multiple of 8 numbers.
GROWTH = 64


class Cache:
    """Keys and values of B rows: for each layer a pair of [B, groups, capacity, d], which grow on demand."""

    def __init__(self, layers: list[int], shape: tuple[int, int, int], like: Tensor) -> None:
        """layers: numbers of the layers. shape: B, groups and d. like: a tensor of their type and device."""
        rows, groups, head_size = shape
        self.pairs = {layer: [like.new_empty(rows, groups, 0, head_size) for _ in "kv"] for layer in layers}

    @property
    def capacity(self) -> int:
        return next((keys.shape[2] for keys, _ in self.pairs.values()), 0)

    def reserve(self, tokens: int, max_tokens: int) -> None:
        """Make room for `tokens` tokens a row. max_tokens: the most that a row will ever have."""
        if tokens <= self.capacity:
            return
        more = round_up(min(max_tokens, max(tokens + GROWTH, self.capacity * 3 // 2)), GROWTH) - self.capacity
        for pair in self.pairs.values():
            for i, x in enumerate(pair):
                pair[i] = torch.cat([x, x.new_zeros(*x.shape[:2], more, x.shape[3])], dim=2)

    def select(self, rows: Tensor) -> None:
        """Keep the rows at these indices, in this order; an index may repeat."""
        for pair in self.pairs.values():
            for i, x in enumerate(pair):
                pair[i] = x.index_select(0, rows)


@dataclass
class DecodingStep(CachedAttention):
    """Attention of the next t tokens of every row over the cache, into which their keys and values go.

    rows: B. start: the column of the cache for the first token. mask: additive, [B, 1, t or 1, start + t]; None for a
    causal mask (t > 1) or none (t = 1). start may be a tensor [1] if t = 1: the mask then has the width of the whole
    cache, and no shape depends on start.
    """

    cache: Cache
    rows: int
    start: int | Tensor
    mask: Tensor | None
    _windowed: dict[int, Tensor] = field(default_factory=dict)  # masks by window, the same in all layers that have it

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None
    ) -> Tensor:
        """See CachedAttention. The S tokens are those of the first row, then those of the second, and so on."""
        heads, groups, head_size = query.shape[2], key.shape[2], key.shape[3]
        query, key, value = (x.view(self.rows, -1, *x.shape[2:]).transpose(1, 2) for x in (query, key, value))
        keys, values = self._store(self.cache.pairs[layer], key, value)
        tokens = query.shape[2]
        keys, values, mask = self._within(window, tokens, keys, values)
        if tokens == 1:  # the heads of a group are queries of one key head
            query = query.reshape(self.rows, groups, heads // groups, head_size)
            out = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)
        else:
            out = F.scaled_dot_product_attention(
                query, keys, values, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
            ).transpose(1, 2)
        return out.reshape(self.rows * tokens, 1, -1)

    def _store(self, pair: list[Tensor], key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write a layer's new keys and values [B, groups, t, d] into the cache, and return all of them so far."""
        keys, values = pair
        if isinstance(self.start, Tensor):
            return keys.index_copy_(2, self.start, key), values.index_copy_(2, self.start, value)
        end = self.start + key.shape[2]
        keys[:, :, self.start : end], values[:, :, self.start : end] = key, value
        return keys[:, :, :end], values[:, :, :end]

    def _within(
        self, window: int | None, tokens: int, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The keys, values and mask that `tokens` queries need, with a sliding window of so many tokens if any."""
        mask, width = self.mask, keys.shape[2]
        if window is None or window >= width:
            return keys, values, mask
        if tokens == 1 and not isinstance(self.start, Tensor):
            first = width - window
            return keys[:, :, first:], values[:, :, first:], None if mask is None else mask[..., first:]
        if window not in self._windowed:
            self._windowed[window] = self._window_mask(window, tokens, keys)
        return keys, values, self._windowed[window]

    def _window_mask(self, window: int, tokens: int, keys: Tensor) -> Tensor:
        """The mask of `tokens` queries, in which what lies before their windows is hidden too."""
        width, mask = keys.shape[2], self.mask
        if isinstance(self.start, Tensor):
            hidden = torch.arange(width, device=keys.device) <= self.start - window
        else:
            hidden = ~causal_mask(tokens, width, window, keys.device)
        mask = torch.zeros(tokens, width, dtype=keys.dtype, device=keys.device) if mask is None else mask
        return mask.masked_fill(hidden, float("-inf"))
