"""Log-probs and entropies of tokens from hidden states, tile by tile over tokens and vocabulary.

Touches tensors and a tensor-parallel group alone: no megatron, no configuration. At no time do the logits of more than
one tile exist: backward computes them again. In half precision on CUDA the Triton kernels of log_probs_kernel write no
logits to memory at all.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float,
    tp_group: dist.ProcessGroup | None = None,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    entropies: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """log softmax(hidden @ weight.T / temperature) at the targets, [n] or [n, m]; with `entropies` also those, [n].

    hidden [n, h] and weight [v_local, h] (rows `vocab_start` and on of the whole output weight; no bias) share one
    floating dtype; targets int64 are ids of the whole vocabulary: one for each token, [n], or m of them, [n, m], of
    which several may be equal. Rows from `vocab_size` on (default: none) are
    padding: their probability is 0, as is their gradient. Results are in nats, float32, or float64 for float64 inputs.

    Under tensor parallelism each rank of `tp_group` holds the same number of rows. All ranks pass the same hidden and
    targets and get the same results, by one collective in forward and none in backward, where the incoming gradients
    must be the same on all ranks. The gradient of `weight` is whole, but that of `hidden` is THIS RANK'S PARTIAL SUM:
    the mapping that hidden went through (megatron's gather from the sequence-parallel region, or copy to the
    tensor-parallel region) adds it up over the group.

    With x = logits / temperature, p = softmax(x) and entropy H: d log p_j / dx_v = [v = j] - p_v and
    dH / dx_v = -p_v (log p_v + H). Only per-token statistics are kept for backward; without gradients nothing is.

    Raises ValueError for a temperature that is not positive, shapes, dtypes or a shard that do not fit, and targets
    outside the vocabulary; on CUDA, where checking them would be a synchronisation, their log-probs are NaN instead.
    """
    ranks, rank = (dist.get_world_size(tp_group), dist.get_rank(tp_group)) if tp_group is not None else (1, 0)
    size = weight.size(0) * ranks if vocab_size is None else vocab_size
    if vocab_start != rank * weight.size(0) or not 0 < size <= ranks * weight.size(0):
        shard = f"row {vocab_start} and {weight.size(0)} rows per rank, on rank {rank} of {ranks}"
        raise ValueError(f"this shard of the output weight does not fit a vocabulary of {size}: {shard}")
    _check(hidden, weight, targets, temperature, size)
    head = _Head(
        scale=1.0 / temperature,
        group=tp_group if ranks > 1 else None,
        start=vocab_start,
        rows=min(max(size - vocab_start, 0), weight.size(0)),
        vocab_size=size,
        entropies=entropies,
    )
    per_token = targets if targets.dim() == 2 else targets.unsqueeze(1)
    log_probs, entropy = _TokenLogProbs.apply(hidden, weight, per_token, head)  # type: ignore[no-untyped-call]
    return log_probs.view(targets.shape), entropy


@dataclass(frozen=True)
class _Head:
    """Settings of the output layer, on this rank."""

    scale: float  # 1 / temperature
    group: dist.ProcessGroup | None
    start: int  # the token id of the local weight's first row
    rows: int  # of the local weight, without padding
    vocab_size: int
    entropies: bool


class _Tile(NamedTuple):
    tokens: int
    vocab: int


# CPU: the fastest tile of several, with one thread at vocabularies of 512 and 152k; its logits stay in the cache.
# CUDA (not measured): matrix products large enough to fill the device, 128 MB of float32 logits. With the sums for the
# gradients, and 32k tokens of 3584 numbers, that stays under 1 GB.
_CPU_TILE = _Tile(512, 1024)
_CUDA_TILE = _Tile(4096, 8192)
# True: the matrix multiplication itself adds a product in half precision to its float32 sum, without a temporary and an
# addition. Not run on a GPU; benchmarks/gpu measures both.
FUSED_SUM = False


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, head: _Head) -> tuple[Tensor, Tensor | None]:
        stats = _local_statistics(hidden, weight[: head.rows], targets - head.start, head)
        if head.group is not None and len(targets):
            gathered = stats.new_empty(dist.get_world_size(head.group), *stats.shape)
            dist.all_gather(list(gathered), stats, group=head.group)
            stats = _merge(gathered)
        maximum, total, weighted, chosen = stats[0], stats[1], stats[2], stats[3:]
        log_total = total.log()
        log_probs = ((chosen - maximum) - log_total).T.contiguous()
        log_probs.masked_fill_((targets < 0) | (targets >= head.vocab_size), torch.nan)
        entropy = log_total - weighted / total if head.entropies else None
        ctx.save_for_backward(hidden, weight, targets, maximum + log_total, entropy)
        ctx.set_materialize_grads(False)
        ctx.head = head
        return log_probs, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_log_probs: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden, weight, targets, log_norm, entropy = ctx.saved_tensors
        head: _Head = ctx.head
        # From here on, gradients are those of the logits before the temperature.
        if grad_log_probs is None:
            grad_log_probs = torch.zeros_like(targets, dtype=log_norm.dtype)
        grad_log_probs = grad_log_probs * head.scale
        grad_entropy = None if grad_entropy is None else grad_entropy * head.scale
        active = _active_rows(grad_log_probs, grad_entropy)
        tokens = _Tokens(hidden, targets - head.start, log_norm, grad_log_probs, grad_entropy, entropy).select(active)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(tokens.hidden, dtype=log_norm.dtype) if need_hidden else None
        grad_weight = torch.zeros_like(weight) if need_weight else None
        _accumulate_gradients(tokens, weight[: head.rows], head.scale, grad_hidden, grad_weight)
        if grad_hidden is not None:
            grad_hidden = grad_hidden.to(hidden.dtype)
            if active is not None:
                grad_hidden = torch.zeros_like(hidden).index_copy_(0, active, grad_hidden)
        return grad_hidden, grad_weight, None, None


def _local_statistics(hidden: Tensor, weight: Tensor, targets: Tensor, head: _Head) -> Tensor:
    """[3 + m, n] statistics of one vocabulary shard, for targets [n, m]. With x = logits / temperature and top their
    maximum: top, sum exp(x - top), sum exp(x - top) (x - top) (0 without head.entropies), and x at each of the m
    targets (0 if in another shard).
    """
    if (kernel := _kernel(hidden, weight)) is not None and len(weight) and len(hidden):
        return _merge(kernel.statistics(hidden, weight, targets, head.scale, head.entropies))
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    stats = torch.zeros(3 + targets.size(1), len(hidden), dtype=dtype, device=hidden.device)
    # The maximum of a shard of padding alone: half of the lowest number, so that differences from it are finite and
    # their exp is 0.
    stats[0] = torch.finfo(dtype).min / 2
    scratch = _Scratch(hidden, weight, 2 if head.entropies else 1)
    for rows in _spans(len(hidden), scratch.tile.tokens):
        parts = [stats[:, rows].clone()]
        for columns in _spans(len(weight), scratch.tile.vocab):
            x, spare = scratch.logits(hidden[rows], weight[columns], head.scale)
            index, inside = _locate(targets[rows] - columns.start, x.size(1))
            chosen = x.gather(1, index).masked_fill_(~inside, 0)
            maximum = x.amax(1)
            x.sub_(maximum.unsqueeze(1))
            exp = x.exp_() if spare is None else torch.exp(x, out=spare)
            total = exp.sum(1)
            weighted = torch.zeros_like(total) if spare is None else x.mul_(exp).sum(1)
            parts.append(torch.cat([torch.stack([maximum, total, weighted]), chosen.T]))
        stats[:, rows] = _merge(torch.stack(parts))
    return stats


def _merge(parts: Tensor) -> Tensor:
    """[3 + m, n] statistics of a vocabulary from those of its parts, [k, 3 + m, n]."""
    maximum, total, weighted, chosen = parts[:, 0], parts[:, 1], parts[:, 2], parts[:, 3:]
    top = maximum.amax(0)
    shift = maximum - top
    share = shift.exp()
    merged = torch.stack([top, (share * total).sum(0), (share * torch.addcmul(weighted, shift, total)).sum(0)])
    return torch.cat([merged, chosen.sum(0)])


class _Tokens(NamedTuple):
    """Inputs of the backward pass per token: targets and grad_log_probs [n, m], the others [n] (hidden [n, h]).

    grad_entropy and entropy are None without a gradient of the entropy."""

    hidden: Tensor
    targets: Tensor
    log_norm: Tensor
    grad_log_probs: Tensor
    grad_entropy: Tensor | None
    entropy: Tensor | None

    def select(self, rows: Tensor | slice | None) -> _Tokens:
        """The tokens at these indices; None: all."""
        return self if rows is None else _Tokens._make(None if x is None else x[rows] for x in self)


def _active_rows(grad_log_probs: Tensor, grad_entropy: Tensor | None) -> Tensor | None:
    """Indices of the tokens with a non-zero gradient; None for all tokens, as always on CUDA. The tokens of unmixed
    groups have weight 0, so that their logits need not be computed again."""
    if not _is_on_host(grad_log_probs):
        return None
    active = (grad_log_probs != 0).any(1)
    if grad_entropy is not None:
        active |= grad_entropy != 0
    return None if active.all() else active.nonzero().squeeze(1)


def _kernel(hidden: Tensor, weight: Tensor) -> ModuleType | None:
    """The module of Triton kernels, or None if they cannot compute log-probs from these tensors."""
    half = hidden.is_cuda and hidden.dtype in (torch.bfloat16, torch.float16)
    return _triton_kernels() if half and hidden.is_contiguous() and weight.is_contiguous() else None


@cache
def _triton_kernels() -> ModuleType | None:
    """The module of Triton kernels; None without Triton."""
    return importlib.import_module("nemo_disco.policy.log_probs_kernel") if importlib.util.find_spec("triton") else None


def _is_on_host(tensor: Tensor) -> bool:
    """True if the values can be read without waiting for a GPU, which would delay the next micro-batches."""
    return tensor.is_cpu


def _accumulate_gradients(
    tokens: _Tokens, weight: Tensor, scale: float, grad_hidden: Tensor | None, grad_weight: Tensor | None
) -> None:
    """Add the gradient of hidden to grad_hidden [n, h] (float32 or float64), and write that of the vocabulary rows in
    `weight` to the first rows of grad_weight (in the weight's dtype). None: not needed.

    The outer loop is over the vocabulary: the float32 sum for a bf16 weight is then needed for one tile at a time.
    """
    kernel = _kernel(tokens.hidden, weight)
    scratch = _Scratch(tokens.hidden, weight, 0 if kernel else 1 if tokens.grad_entropy is None else 2)
    for columns in _spans(len(weight), scratch.tile.vocab):
        part = weight[columns]
        grad_part = torch.zeros_like(part, dtype=tokens.log_norm.dtype) if grad_weight is not None else None
        for rows in _spans(len(tokens.hidden), scratch.tile.tokens):
            block = tokens.select(rows)
            if kernel is None:
                logits, spare = scratch.logits(block.hidden, part, scale)
                grad = _logit_gradients(logits, spare, block, columns.start).to(weight.dtype)
            else:
                grad = part.new_empty(len(block.hidden), len(part))
                targets = block.targets - columns.start
                kernel.logit_gradients(block.hidden, part, targets, *block[2:], scale=scale, out=grad)
            if grad_hidden is not None:
                _add_product(grad_hidden[rows], grad, part)
            if grad_part is not None:
                _add_product(grad_part, grad.T, block.hidden)
        if grad_weight is not None and grad_part is not None:
            grad_weight[columns] = grad_part


def _logit_gradients(logits: Tensor, spare: Tensor | None, tokens: _Tokens, first: int) -> Tensor:
    """Turn a tile of logits, in place, into the gradient with respect to them; `first`: its first vocabulary row."""
    index, inside = _locate(tokens.targets - first, logits.size(1))
    log_p = logits.sub_(tokens.log_norm.unsqueeze(1))
    outer = tokens.grad_log_probs.sum(1, keepdim=True)
    if tokens.grad_entropy is None or tokens.entropy is None or spare is None:
        grad = log_p.exp_().mul_(-outer)
    else:
        p = torch.exp(log_p, out=spare)
        grad = log_p.add_(tokens.entropy.unsqueeze(1)).mul_(-tokens.grad_entropy.unsqueeze(1)).sub_(outer).mul_(p)
    return grad.scatter_add_(1, index, tokens.grad_log_probs.masked_fill(~inside, 0))


class _Scratch:
    """Buffers for one tile of logits, which all tiles use in turn."""

    def __init__(self, hidden: Tensor, weight: Tensor, buffers: int) -> None:
        self.tile = _CUDA_TILE if hidden.is_cuda else _CPU_TILE
        size = min(self.tile.tokens, len(hidden)) * min(self.tile.vocab, len(weight))
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        self.buffers = [torch.empty(size, dtype=dtype, device=hidden.device) for _ in range(buffers)]

    def logits(self, hidden: Tensor, weight: Tensor, scale: float) -> tuple[Tensor, Tensor | None]:
        """hidden @ weight.T * scale in the first buffer, and the second buffer (if any) in the same shape."""
        shape = len(hidden), len(weight)
        logits, *spare = (b[: shape[0] * shape[1]].view(shape) for b in self.buffers)
        if hidden.dtype == logits.dtype:
            logits.addmm_(hidden, weight.T, beta=0, alpha=scale)
        elif hidden.is_cuda:  # without out_dtype a logit of 16 would be rounded to half precision: by 0.03
            torch.mm(hidden, weight.T, out_dtype=logits.dtype, out=logits).mul_(scale)
        else:
            logits.copy_(hidden @ weight.T).mul_(scale)
        return logits, spare[0] if spare else None


def _locate(targets: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """[r, m] column indices within the tile, for gather and scatter, and [r, m] True where a target is in the tile."""
    return targets.clamp(0, size - 1), (targets >= 0) & (targets < size)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, summed in the type of `total`."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif a.is_cuda and FUSED_SUM:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    elif a.is_cuda:
        total.add_(torch.mm(a, b, out_dtype=total.dtype))
    else:
        total.add_(a @ b)


def _spans(length: int, step: int) -> Iterator[slice]:
    return (slice(i, min(i + step, length)) for i in range(0, length, step))


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, vocab_size: int) -> None:
    if not temperature > 0:
        raise ValueError(f"the temperature of log-probs must be positive, not {temperature}")
    fits = hidden.dim() == weight.dim() == 2 and hidden.size(1) == weight.size(1)
    if not fits or targets.dim() not in (1, 2) or len(targets) != len(hidden):
        shapes = ", ".join(str(tuple(x.shape)) for x in (hidden, weight, targets))
        raise ValueError(f"log-probs need hidden [n, h], weight [v, h] and targets [n] or [n, m], not {shapes}")
    if hidden.dtype != weight.dtype or not hidden.is_floating_point() or targets.dtype != torch.int64:
        dtypes = f"{hidden.dtype}, {weight.dtype}, {targets.dtype}"
        raise ValueError(f"log-probs need hidden and weight of one floating dtype and int64 targets, not {dtypes}")
    if _is_on_host(targets) and targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < vocab_size:
        span = f"{int(targets.min())} to {int(targets.max())}"
        raise ValueError(f"targets must be token ids below the vocabulary size {vocab_size}, not {span}")
