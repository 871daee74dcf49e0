"""Core attention for megatron-core's local layer spec: causal attention inside each sequence of a packed micro-batch.

Runs on CPU and CUDA without Transformer Engine. Knows nothing of the model around it: the model has applied rope.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

# Under causal attention right-padding needs no mask (no real token attends to what follows it), so neighbours of
# similar length share one call. Past this share of padding, a call of its own is cheaper on a CPU.
_MAX_PADDING = 0.2


@dataclass(frozen=True)
class Bucket:
    """Neighbouring sequences computed in one call, right-padded to `width` tokens.

    gather [count * width]: which token of the micro-batch stands where (padding repeats the first one).
    scatter [stop - start]: where each token's output is found among count * width.
    Both are None when nothing is padded.
    """

    start: int
    stop: int
    count: int
    width: int
    gather: Tensor | None
    scatter: Tensor | None


@dataclass(frozen=True)
class Stretch:
    """Under context parallelism: this rank's tokens [start, stop) attend, causally, to the gathered keys
    [keys_start, keys_stop), with which they end."""

    start: int
    stop: int
    keys_start: int
    keys_stop: int


@dataclass
class PackedSequences(PackedSeqParams):  # type: ignore[misc]
    """The sequences of one micro-batch, back to back; order them by length, so that neighbours share a bucket.

    The format stays "sbhd" with a batch of one: megatron then applies rope to the micro-batch as a whole (the model
    passes each token's own angle) instead of slicing it sequence by sequence.

    Under context parallelism each sequence is a multiple of 2 CP long and cut in 2 CP chunks, of which rank r has the
    r-th and the r-th from the end (equal work under causal attention). local [S / CP]: which tokens of the whole
    micro-batch those are; natural [S]: where each token of the whole stands among the gathered shares of all ranks.
    """

    qkv_format: str = "sbhd"
    buckets: tuple[Bucket, ...] = ()
    stretches: tuple[Stretch, ...] = ()
    local: Tensor | None = None
    natural: Tensor | None = None

    @classmethod
    def from_lengths(
        cls, lengths: Sequence[int], device: torch.device | str = "cpu", context_rank: int = 0, context_size: int = 1
    ) -> PackedSequences:
        if context_size > 1:
            return _cut(cls, lengths, device, context_rank, context_size)
        buckets, first, start = [], 0, 0
        while first < len(lengths):
            last, total, width = first, 0, 0
            while last < len(lengths):
                grown = max(width, lengths[last])
                padding = grown * (last - first + 1) - total - lengths[last]
                if padding > _MAX_PADDING * (total + lengths[last]):
                    break
                last, total, width = last + 1, total + lengths[last], grown
            buckets.append(_bucket(start, lengths[first:last], width, device))
            first, start = last, start + total
        return cls(buckets=tuple(buckets))


def _cut(
    cls: type[PackedSequences], lengths: Sequence[int], device: torch.device | str, rank: int, size: int
) -> PackedSequences:
    shares: list[list[Tensor]] = [[] for _ in range(size)]
    stretches, start, stop = [], 0, 0
    for length in lengths:
        chunks = torch.arange(start, start + length).chunk(2 * size)
        for r, share in enumerate(shares):
            share += [chunks[r], chunks[2 * size - 1 - r]]
        for chunk in shares[rank][-2:]:
            stretches.append(Stretch(stop, stop + len(chunk), start, int(chunk[-1]) + 1))
            stop += len(chunk)
        start += length
    gathered = torch.cat([chunk for share in shares for chunk in share])
    local = torch.cat(shares[rank])
    return cls(stretches=tuple(stretches), local=local.to(device), natural=gathered.argsort().to(device))


def _bucket(start: int, lengths: Sequence[int], width: int, device: torch.device | str) -> Bucket:
    count, total = len(lengths), sum(lengths)
    if total == count * width:
        return Bucket(start, start + total, count, width, None, None)
    sizes = torch.tensor(lengths)
    real = torch.arange(width)[None] < sizes[:, None]
    gather = torch.zeros(count, width, dtype=torch.int64)
    gather[real] = torch.arange(total)
    scatter = real.flatten().nonzero().flatten()
    return Bucket(start, start + total, count, width, gather.flatten().to(device), scatter.to(device))


class PackedCausalAttention(MegatronModule):  # type: ignore[misc]
    """softmax(q k^T * scale) v, causal inside each sequence. query [S, 1, heads, d]; key, value [S, 1, groups, d]."""

    def __init__(self, config: Any, softmax_scale: float | None = None, pg_collection: Any = None, **_: Any) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.context_group = pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *_: Any,
        packed_seq_params: PackedSequences,
        **__: Any,
    ) -> Tensor:
        """[S, 1, heads * d]; masks that megatron passes are not read: the packing says who attends to whom."""
        q, k, v = (x.squeeze(1) for x in (query, key, value))
        if packed_seq_params.natural is None:
            out = torch.cat([self._attend(q, k, v, bucket) for bucket in packed_seq_params.buckets])
        else:
            out = self._attend_across_ranks(q, k, v, packed_seq_params)
        return out.reshape(query.shape[0], 1, -1)

    def _attend_across_ranks(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences) -> Tensor:
        """Every rank's keys and values are gathered (grouped queries keep them small), the queries stay."""
        key, value = (
            gather_from_sequence_parallel_region(x.contiguous(), group=self.context_group).index_select(
                0, packed.natural
            )
            for x in (key, value)
        )
        pieces = []
        for s in packed.stretches:
            q, k, v = (
                x.transpose(0, 1)[None]
                for x in (query[s.start : s.stop], key[s.keys_start : s.keys_stop], value[s.keys_start : s.keys_stop])
            )
            mask = causal_lower_right(q.shape[2], k.shape[2])
            grouped = q.shape[1] != k.shape[1]
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale, enable_gqa=grouped)
            pieces.append(out[0].transpose(0, 1))
        return torch.cat(pieces)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, bucket: Bucket) -> Tensor:
        def batched(x: Tensor) -> Tensor:  # [S, h, d] -> [count, h, width, d]
            x = x[bucket.start : bucket.stop]
            if bucket.gather is not None:
                x = x.index_select(0, bucket.gather)
            return x.view(bucket.count, bucket.width, *x.shape[1:]).transpose(1, 2)

        out = F.scaled_dot_product_attention(
            batched(query),
            batched(key),
            batched(value),
            is_causal=True,
            scale=self.scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        out = out.transpose(1, 2).reshape(bucket.count * bucket.width, *query.shape[1:])
        return out if bucket.scatter is None else out.index_select(0, bucket.scatter)

    def sharded_state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        """There is no state."""
        return {}
