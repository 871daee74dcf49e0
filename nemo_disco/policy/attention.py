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
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

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


@dataclass
class PackedSequences(PackedSeqParams):  # type: ignore[misc]
    """The sequences of one micro-batch, back to back; order them by length, so that neighbours share a bucket.

    The format stays "sbhd" with a batch of one: megatron then applies rope to the micro-batch as a whole (the model
    passes each token's own angle) instead of slicing it sequence by sequence.
    """

    qkv_format: str = "sbhd"
    buckets: tuple[Bucket, ...] = ()

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> PackedSequences:
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
    """softmax(q k^T * scale) v, causal inside each sequence. query [S, 1, heads, d]; key and value [S, 1, groups, d]."""

    def __init__(self, config: Any, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

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
        out = torch.cat([self._attend(q, k, v, bucket) for bucket in packed_seq_params.buckets])
        return out.reshape(query.shape[0], 1, -1)

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
