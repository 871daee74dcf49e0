"""Core attention for megatron-core's local layer spec: causal attention inside each sequence of a packed micro-batch.

For models without Transformer Engine: torch's flash kernel in half precision on CUDA (not run), else SDPA. Queries and
keys arrive with rope applied. In a layer with a sliding window of w tokens, a token attends to itself and to the w - 1
tokens before it.
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
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.varlen import varlen_attn

from nemo_disco.data.packing import round_up
from nemo_disco.policy.routes import TokenRoutes

# Grouped queries need no argument in torch 2.11's flash kernel; later versions have one.
_GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
# Where the flash kernel can be used, sequences of at least this many tokens are computed one by one by SDPA, which has
# cuDNN's kernel on Hopper (published as faster than FlashAttention 2, torch's kernel for packed sequences). None: all
# are packed. Not run on a GPU; benchmarks/gpu measures both.
LONG_FROM: int | None = None
# Such a sequence is padded on the right to a multiple of this: cuDNN needs tens of milliseconds for each new length.
LONG_MULTIPLE = 512
LONG_BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
# Under causal attention right-padding needs no mask (no real token attends to what follows it), so that neighbours of
# similar length share one call. Beyond this share of padding, a separate call is cheaper on a CPU.
_MAX_PADDING = 0.2


@dataclass(frozen=True)
class Bucket:
    """Neighbouring sequences computed in one call, right-padded to `width` tokens.

    start, stop: the bucket's tokens in the micro-batch; count: its number of sequences.
    gather [count * width]: index, in the bucket, of the token at each padded place (padding repeats the first token).
    scatter [stop - start]: padded place of each token of the bucket. Both are None when nothing is padded.
    """

    start: int
    stop: int
    count: int
    width: int
    gather: Tensor | None
    scatter: Tensor | None


@dataclass
class PackedSequences(PackedSeqParams):  # type: ignore[misc]
    """The sequences of one micro-batch, back to back, shortest first (padding last), so that neighbours share a bucket.

    The format stays "sbhd" with a batch of one: rope is applied to the whole micro-batch, by each token's position.

    cu_seqlens_q, cu_seqlens_kv [pieces + 1] int32, max_seqlen_q, max_seqlen_kv: offsets and longest length of the
    pieces (without context parallelism: the sequences), in the form of the flash kernels' arguments.
    starts [sequences + 1] int32: offsets of the whole sequences. buckets: for SDPA, without context parallelism.

    Under context parallelism each sequence is a multiple of 2 CP long and cut into 2 CP pieces, of which rank r has the
    r-th and the r-th from the end (equal work under causal attention). local [S / CP]: index of this rank's tokens in
    the whole micro-batch. keys: for each piece in turn, index of the keys that it attends to in the concatenated shares
    of all ranks; the last of them are the piece's own. piece_sizes: number of queries and of keys of each.

    routes: of this rank's tokens, where experts are recorded or given.
    """

    qkv_format: str = "sbhd"
    lengths: tuple[int, ...] = ()
    piece_sizes: tuple[tuple[int, int], ...] = ()
    starts: Tensor | None = None
    local: Tensor | None = None
    keys: Tensor | None = None
    buckets: tuple[Bucket, ...] = ()
    routes: TokenRoutes | None = None

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], context_rank: int = 0, context_size: int = 1) -> PackedSequences:
        """The layout of sequences with these lengths, as tensors on the host."""
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
        """The uncut sequences in Transformer Engine's format ("thd"), also under context parallelism."""
        return _thd(self.starts, max(self.lengths))


def _thd(starts: Tensor | None, longest: int) -> PackedSeqParams:
    # Without cu_seqlens_padded, which Transformer Engine would compare with cu_seqlens on the host, in every layer.
    return PackedSeqParams("thd", starts, starts, max_seqlen_q=longest, max_seqlen_kv=longest)


def _starts(lengths: Sequence[int]) -> Tensor:
    """[n + 1] int32: the token at which each sequence starts, and the end of the last."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def _cut(lengths: Sequence[int], rank: int, size: int) -> dict[str, Any]:
    """The fields of PackedSequences that describe one rank's share under context parallelism."""
    shares: list[list[Tensor]] = [[] for _ in range(size)]
    ranges, start = [], 0
    for length in lengths:
        pieces = torch.arange(start, start + length).chunk(2 * size)
        for r, share in enumerate(shares):
            share += [pieces[r], pieces[2 * size - 1 - r]]
        ranges += [torch.arange(start, int(piece[-1]) + 1) for piece in shares[rank][-2:]]
        start += length
    places = torch.cat([piece for share in shares for piece in share]).argsort()
    queries, keys = ([len(x) for x in parts] for parts in (shares[rank], ranges))
    return {
        "cu_seqlens_q": _starts(queries),
        "cu_seqlens_kv": _starts(keys),
        "max_seqlen_q": max(queries),
        "max_seqlen_kv": max(keys),
        "local": torch.cat(shares[rank]),
        "keys": places[torch.cat(ranges)],
        "piece_sizes": tuple(zip(queries, keys, strict=True)),
    }


def _buckets(lengths: Sequence[int]) -> tuple[Bucket, ...]:
    """Put neighbouring sequences into buckets, each with as many as _MAX_PADDING allows."""
    buckets, first, start = [], 0, 0
    while first < len(lengths):
        end, total, width = first, 0, 0
        while end < len(lengths):
            wider = max(width, lengths[end])
            padding = wider * (end - first + 1) - total - lengths[end]
            if padding > _MAX_PADDING * (total + lengths[end]):
                break
            end, total, width = end + 1, total + lengths[end], wider
        buckets.append(_bucket(start, lengths[first:end], width))
        first, start = end, start + total
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
    """True if torch's flash attention supports the queries' type, device and width of a head. Not run."""
    width = query.shape[-1]
    return query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and width <= 256 and width % 8 == 0


def layer_window(config: Any, layer: int) -> int | None:
    """How many tokens a token of layer `layer` (from 1) attends to, itself included; None for all before it."""
    if is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer):
        return int(config.window_size[0]) + 1
    return None


def causal_mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """[queries, keys] True where a query attends to a key; the last query and the last key are the same token."""
    distance = torch.arange(queries, device=device)[:, None] + (keys - queries) - torch.arange(keys, device=device)
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


class PackedCausalAttention(MegatronModule):  # type: ignore[misc]
    """softmax(q k^T * scale) v, causal inside each sequence. query [S, 1, heads, d]; key, value [S, 1, groups, d]."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.window = layer_window(config, layer_number)
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
        """Output [S, 1, heads * d]. The mask that megatron passes is ignored: packed_seq_params implies it."""
        packed = packed_seq_params
        q, k, v = (x.squeeze(1) for x in (query, key, value))
        if packed.keys is not None:
            # The keys and values of all ranks are gathered (grouped queries keep them small), the queries are not.
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
            out = self._attend_by_piece(q, k, v, packed)
        return out.reshape(query.shape[0], 1, -1)

    def _flash(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSeqParams) -> Tensor:
        """Attention by torch's flash kernel for ragged sequences, whose mask is aligned to the last query and key."""
        sizes = packed.cu_seqlens_q, packed.cu_seqlens_kv, packed.max_seqlen_q, packed.max_seqlen_kv
        before = -1 if self.window is None else self.window - 1
        out = varlen_attn(query, key, value, *sizes, scale=self.scale, window_size=(before, 0), **_GROUPED)
        return cast(Tensor, out)

    def _by_length(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences, long_from: int) -> Tensor:
        """Attention of the shorter sequences, which come first, in one packed call, and of the others one by one."""
        lengths = packed.lengths
        count = next((i for i, n in enumerate(lengths) if n >= long_from), len(lengths))
        if packed.keys is not None or count == len(lengths) or self.window is not None:
            return self._flash(query, key, value, packed)
        sizes = [sum(lengths[:count]), *lengths[count:]]
        parts = list(zip(*(torch.split(x, sizes) for x in (query, key, value)), strict=True))
        pieces = [self._attend_alone(*qkv) for qkv in parts[1:]]
        if count:
            assert packed.starts is not None
            q, k, v = parts[0]
            pieces.insert(0, self._flash(q, k, v, _thd(packed.starts[: count + 1], max(lengths[:count]))))
        return torch.cat(pieces)

    def _attend_alone(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of one sequence. It is padded on the right, where no real token attends under a causal mask."""
        tokens = len(query)
        extra = round_up(tokens, LONG_MULTIPLE) - tokens
        with sdpa_kernel(LONG_BACKENDS, set_priority=True):
            return self._sdpa(*(F.pad(x, (0, 0, 0, 0, 0, extra))[None] for x in (query, key, value)))[0, :tokens]

    def _attend_by_piece(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences) -> Tensor:
        """Attention of this rank's pieces, one by one, to the gathered keys and values."""
        queries, keys = (list(sizes) for sizes in zip(*packed.piece_sizes, strict=True))
        parts = (torch.split(x, sizes) for x, sizes in ((query, queries), (key, keys), (value, keys)))
        return torch.cat([self._sdpa(*(x[None] for x in piece))[0] for piece in zip(*parts, strict=True)])

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, bucket: Bucket) -> Tensor:
        """Attention of one bucket's sequences in one call."""

        def batch(x: Tensor) -> Tensor:  # [S, h, d] -> [count, width, h, d]
            x = x[bucket.start : bucket.stop]
            if bucket.gather is not None:
                x = x.index_select(0, bucket.gather)
            return x.view(bucket.count, bucket.width, *x.shape[1:])

        out = self._sdpa(batch(query), batch(key), batch(value)).reshape(-1, *query.shape[1:])
        return out if bucket.scatter is None else out.index_select(0, bucket.scatter)

    def _sdpa(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of [batch, length, heads, d] by SDPA; its causal mask is aligned to the last query and key."""
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        queries, keys = q.shape[2], k.shape[2]
        mask: Tensor | None = None
        if self.window is not None and self.window < keys:
            mask = causal_mask(queries, keys, self.window, q.device)
        elif queries != keys:
            mask = causal_lower_right(queries, keys)
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=grouped
        )
        return out.transpose(1, 2)

    def sharded_state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        """Empty: attention has no weights."""
        return {}
