"""Core attention for megatron-core's local layer spec: causal attention inside each sequence of a packed micro-batch.

Without Transformer Engine: torch's flash kernel in half precision on CUDA (not run), else SDPA. Knows nothing of the
model around it: the model has applied rope.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.varlen import varlen_attn

from nemo_disco.data.packing import round_up

# torch 2.11's flash kernel takes grouped queries as they are; later ones want to be told.
_GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
# Where there is a flash kernel: sequences of at least so many tokens are computed one by one by SDPA, which has cuDNN's
# kernel on Hopper (published as faster than FlashAttention 2, torch's for packed sequences). None: all are packed.
# Not run on a GPU; benchmarks/gpu measures both.
LONG_FROM: int | None = None
# cuDNN builds a plan for each new length (tens of milliseconds): these are padded on the right to a multiple of it.
LONG_MULTIPLE = 512
LONG_BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
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

    cu_seqlens_q, cu_seqlens_kv [pieces + 1] int32, max_seqlen_q, max_seqlen_kv: as the flash kernels take them.
    starts [sequences + 1] int32: of the whole sequences; without context parallelism the same.

    Under context parallelism each sequence is a multiple of 2 CP long and cut in 2 CP chunks, of which rank r has the
    r-th and the r-th from the end (equal work under causal attention). local [S / CP]: which tokens of the whole
    micro-batch those are; keys: for each piece of this rank's tokens in turn, where the keys that it attends to stand
    among the gathered shares of all ranks; stretches: how many queries and keys a piece has. Its queries are the last
    of its keys. buckets: for SDPA, without context parallelism.
    """

    qkv_format: str = "sbhd"
    lengths: tuple[int, ...] = ()
    stretches: tuple[tuple[int, int], ...] = ()
    starts: Tensor | None = None
    local: Tensor | None = None
    keys: Tensor | None = None
    buckets: tuple[Bucket, ...] = ()

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], context_rank: int = 0, context_size: int = 1) -> PackedSequences:
        """On the host."""
        starts = _starts(lengths)
        if context_size > 1:
            return cls(lengths=tuple(lengths), starts=starts, **_cut(lengths, context_rank, context_size))
        longest = max(lengths)
        return cls(
            cu_seqlens_q=starts,
            cu_seqlens_kv=starts,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            lengths=tuple(lengths),
            starts=starts,
            buckets=_buckets(lengths),
        )

    @cached_property
    def whole(self) -> PackedSeqParams:
        """The sequences as Transformer Engine takes them ("thd"): whole ones, also under context parallelism."""
        starts, longest = self.starts, max(self.lengths)
        # No cu_seqlens_padded: Transformer Engine would compare it with this on the host, in every layer.
        return PackedSeqParams("thd", starts, starts, max_seqlen_q=longest, max_seqlen_kv=longest)


def _starts(lengths: Sequence[int]) -> Tensor:
    """[n + 1] where each starts, and the end."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def _cut(lengths: Sequence[int], rank: int, size: int) -> dict[str, Any]:
    shares: list[list[Tensor]] = [[] for _ in range(size)]
    reach, start = [], 0
    for length in lengths:
        chunks = torch.arange(start, start + length).chunk(2 * size)
        for r, share in enumerate(shares):
            share += [chunks[r], chunks[2 * size - 1 - r]]
        reach += [torch.arange(start, int(chunk[-1]) + 1) for chunk in shares[rank][-2:]]
        start += length
    standing = torch.cat([chunk for share in shares for chunk in share]).argsort()
    queries, keys = ([len(x) for x in pieces] for pieces in (shares[rank], reach))
    return {
        "cu_seqlens_q": _starts(queries),
        "cu_seqlens_kv": _starts(keys),
        "max_seqlen_q": max(queries),
        "max_seqlen_kv": max(keys),
        "local": torch.cat(shares[rank]),
        "keys": standing[torch.cat(reach)],
        "stretches": tuple(zip(queries, keys, strict=True)),
    }


def _buckets(lengths: Sequence[int]) -> tuple[Bucket, ...]:
    buckets, first, start = [], 0, 0
    while first < len(lengths):
        last, total, width = first, 0, 0
        while last < len(lengths):
            grown = max(width, lengths[last])
            padding = grown * (last - first + 1) - total - lengths[last]
            if padding > _MAX_PADDING * (total + lengths[last]):
                break
            last, total, width = last + 1, total + lengths[last], grown
        buckets.append(_bucket(start, lengths[first:last], width))
        first, start = last, start + total
    return tuple(buckets)


def _bucket(start: int, lengths: Sequence[int], width: int) -> Bucket:
    count, total = len(lengths), sum(lengths)
    if total == count * width:
        return Bucket(start, start + total, count, width, None, None)
    sizes = torch.tensor(lengths)
    real = torch.arange(width)[None] < sizes[:, None]
    gather = torch.zeros(count, width, dtype=torch.int64)
    gather[real] = torch.arange(total)
    scatter = real.flatten().nonzero().flatten()
    return Bucket(start, start + total, count, width, gather.flatten(), scatter)


def has_flash_kernel(query: Tensor) -> bool:
    """Whether torch's flash attention takes these: half precision on CUDA, heads of a width that it has. Not run."""
    width = query.shape[-1]
    return query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and width <= 256 and width % 8 == 0


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
        packed = packed_seq_params
        q, k, v = (x.squeeze(1) for x in (query, key, value))
        if packed.keys is not None:
            # Every rank's keys and values are gathered (grouped queries keep them small), the queries stay.
            k, v = (
                gather_from_sequence_parallel_region(x.contiguous(), group=self.context_group).index_select(
                    0, packed.keys
                )
                for x in (k, v)
            )
        if has_flash_kernel(q):
            out = self._flash(q, k, v, packed) if LONG_FROM is None else self._by_length(q, k, v, packed, LONG_FROM)
        elif packed.keys is None:
            out = torch.cat([self._attend(q, k, v, bucket) for bucket in packed.buckets])
        else:
            out = self._attend_in_stretches(q, k, v, packed)
        return out.reshape(query.shape[0], 1, -1)

    def _flash(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences) -> Tensor:
        """torch's flash kernel for ragged sequences, whose causal mask is aligned to the last query and key."""
        out = varlen_attn(
            query,
            key,
            value,
            packed.cu_seqlens_q,
            packed.cu_seqlens_kv,
            packed.max_seqlen_q,
            packed.max_seqlen_kv,
            scale=self.scale,
            window_size=(-1, 0),
            **_GROUPED,
        )
        return cast(Tensor, out)

    def _by_length(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences, long_from: int) -> Tensor:
        """The shorter sequences, which come first, packed; the others one by one."""
        lengths = packed.lengths
        count = next((i for i, n in enumerate(lengths) if n >= long_from), len(lengths))
        if packed.keys is not None or count == len(lengths):
            return self._flash(query, key, value, packed)
        sizes = [sum(lengths[:count]), *lengths[count:]]
        parts = list(zip(*(torch.split(x, sizes) for x in (query, key, value)), strict=True))
        pieces = [self._attend_alone(*qkv) for qkv in parts[1:]]
        if count:
            assert packed.starts is not None
            starts, longest = packed.starts[: count + 1], max(lengths[:count])
            packing = PackedSequences(
                cu_seqlens_q=starts, cu_seqlens_kv=starts, max_seqlen_q=longest, max_seqlen_kv=longest
            )
            q, k, v = parts[0]
            pieces.insert(0, self._flash(q, k, v, packing))
        return torch.cat(pieces)

    def _attend_alone(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """One sequence, padded where under a causal mask no real token sees it."""
        tokens = len(query)
        extra = round_up(tokens, LONG_MULTIPLE) - tokens
        q, k, v = (F.pad(x, (0, 0, 0, 0, 0, extra)).transpose(0, 1)[None] for x in (query, key, value))
        with sdpa_kernel(LONG_BACKENDS, set_priority=True):
            grouped = q.shape[1] != k.shape[1]
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=grouped)
        return out[0].transpose(0, 1)[:tokens]

    def _attend_in_stretches(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences) -> Tensor:
        queries, counts = (list(sizes) for sizes in zip(*packed.stretches, strict=True))
        parts = (torch.split(x, sizes) for x, sizes in ((query, queries), (key, counts), (value, counts)))
        pieces = []
        for stretch in zip(*parts, strict=True):
            q, k, v = (x.transpose(0, 1)[None] for x in stretch)
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
