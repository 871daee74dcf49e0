"""Log-probs and entropies of tokens from hidden states, tile by tile over tokens and vocabulary.

Touches tensors and the tensor-parallel group that it is given, nothing else: no megatron, no configuration.
It must never hold the logits of more than one tile: backward computes them again. In half precision on CUDA the Triton
kernels of log_probs_kernel hold none at all.
"""

from __future__ import annotations

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
    """log softmax(hidden @ weight.T / temperature) at the targets, [n], and on request the entropies [n].

    hidden [n, h] and weight [v_local, h] (rows `vocab_start` and on of the whole output weight; no bias) share one
    floating dtype; targets [n] int64 are ids of the whole vocabulary. Rows from `vocab_size` on (default: none) are
    padding: their probability is 0, as is their gradient. Results are in nats, float32, or float64 for float64 inputs.

    Under tensor parallelism each rank of `tp_group` holds equally many rows; all pass the same hidden and targets and
    get the same results, by one collective in forward and none in backward, where all must bring the same incoming
    gradients. The gradient of `weight` is whole, but that of `hidden` is THIS RANK'S PARTIAL SUM: the mapping through
    which hidden came (megatron's gather from the sequence-parallel region, or copy to the tensor-parallel region) adds
    it up over the group.

    With x = logits / temperature, p = softmax(x) and entropy H: d log p_t / dx_v = [v = t] - p_v and
    dH / dx_v = -p_v (log p_v + H). Only per-token statistics are kept for backward; without gradients nothing is.

    Raises ValueError for a temperature that is not positive, shapes, dtypes or a shard that do not fit, and targets
    outside the vocabulary; on CUDA, where a look at them would be a synchronisation, these get NaN instead.
    """
    ranks, rank = (dist.get_world_size(tp_group), dist.get_rank(tp_group)) if tp_group is not None else (1, 0)
    size = weight.size(0) * ranks if vocab_size is None else vocab_size
    if vocab_start != rank * weight.size(0) or not 0 < size <= ranks * weight.size(0):
        held = f"row {vocab_start} and {weight.size(0)} rows a rank, on rank {rank} of {ranks}"
        raise ValueError(f"this shard of the output weight does not fit a vocabulary of {size}: {held}")
    _check(hidden, weight, targets, temperature, size)
    head = _Head(
        scale=1.0 / temperature,
        group=tp_group if ranks > 1 else None,
        start=vocab_start,
        rows=min(max(size - vocab_start, 0), weight.size(0)),
        vocab_size=size,
        entropies=entropies,
    )
    log_probs, entropy = _TokenLogProbs.apply(hidden, weight, targets, head)  # type: ignore[no-untyped-call]
    return log_probs, entropy


@dataclass(frozen=True)
class _Head:
    """What turns hidden states into logits, besides the weight; `rows` of the local weight are not padding."""

    scale: float
    group: dist.ProcessGroup | None
    start: int
    rows: int
    vocab_size: int
    entropies: bool


class _Tile(NamedTuple):
    tokens: int
    vocab: int


# CPU: the fastest of those tried with one thread at vocabularies of 512 and 152k; a tile of logits stays in the cache.
# CUDA (not measured): matrix products large enough to fill the device, 128 MB of float32 logits. With the sums for the
# gradients, and 32k tokens of 3584 numbers, that stays under 1 GB.
_CPU_TILE = _Tile(512, 1024)
_CUDA_TILE = _Tile(4096, 8192)
# Whether a product in half precision is added to its float32 sum by the matrix multiplication itself, without a
# temporary and an addition. Not run on a GPU; benchmarks/gpu measures both.
FUSED_SUM = False


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, head: _Head) -> tuple[Tensor, Tensor | None]:
        stats = _local_statistics(hidden, weight[: head.rows], targets - head.start, head)
        if head.group is not None and len(targets):
            gathered = stats.new_empty(dist.get_world_size(head.group), *stats.shape)
            dist.all_gather(list(gathered), stats, group=head.group)
            stats = _merge(gathered)
        maximum, total, chosen, weighted = stats
        log_total = total.log()
        log_probs = (chosen - maximum) - log_total
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
        # From here on gradients are with respect to the logits before the temperature.
        grad_log_probs = torch.zeros_like(log_norm) if grad_log_probs is None else grad_log_probs * head.scale
        grad_entropy = None if grad_entropy is None else grad_entropy * head.scale
        active = _active_rows(grad_log_probs, grad_entropy)
        tokens = _Tokens(hidden, targets - head.start, log_norm, grad_log_probs, grad_entropy, entropy).pick(active)
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
    """[4, n] of one vocabulary shard, x being its logits over the temperature and m their maximum:
    m, sum exp(x - m), x at the target (0 if it is elsewhere), sum exp(x - m) (x - m) (0 unless entropies are wanted).
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    if (kernel := _kernel(hidden, weight)) is not None and len(weight) and len(hidden):
        return _merge(kernel.statistics(hidden, weight, targets, head.scale, head.entropies))
    stats = torch.zeros(4, len(hidden), dtype=dtype, device=hidden.device)
    # A shard of padding alone: half of the lowest number, so that differences from it are finite and exp makes them 0.
    stats[0] = torch.finfo(dtype).min / 2
    scratch = _Scratch(hidden, weight, 2 if head.entropies else 1)
    for rows in _spans(len(hidden), scratch.tile.tokens):
        parts = [stats[:, rows].clone()]
        for columns in _spans(len(weight), scratch.tile.vocab):
            x, spare = scratch.logits(hidden[rows], weight[columns], head.scale)
            index, inside = _locate(targets[rows] - columns.start, x.size(1))
            chosen = x.gather(1, index).squeeze(1).masked_fill_(~inside, 0)
            maximum = x.amax(1)
            x.sub_(maximum.unsqueeze(1))
            exp = x.exp_() if spare is None else torch.exp(x, out=spare)
            total = exp.sum(1)
            weighted = torch.zeros_like(total) if spare is None else x.mul_(exp).sum(1)
            parts.append(torch.stack([maximum, total, chosen, weighted]))
        stats[:, rows] = _merge(torch.stack(parts))
    return stats


def _merge(parts: Tensor) -> Tensor:
    """The statistics [4, n] of a vocabulary from those of its parts [k, 4, n]."""
    maximum, total, chosen, weighted = parts.unbind(1)
    top = maximum.amax(0)
    shift = maximum - top
    share = shift.exp()
    return torch.stack(
        [top, (share * total).sum(0), chosen.sum(0), (share * torch.addcmul(weighted, shift, total)).sum(0)]
    )


class _Tokens(NamedTuple):
    """What backward needs of each token; grad_entropy and entropy are None where no gradient came through H."""

    hidden: Tensor
    targets: Tensor
    log_norm: Tensor
    grad_log_probs: Tensor
    grad_entropy: Tensor | None
    entropy: Tensor | None

    def pick(self, rows: Tensor | slice | None) -> _Tokens:
        return self if rows is None else _Tokens._make(None if x is None else x[rows] for x in self)


def _active_rows(grad_log_probs: Tensor, grad_entropy: Tensor | None) -> Tensor | None:
    """The tokens with a non-zero gradient, None for all: unmixed groups have weight 0 and need no recomputation."""
    if not _may_look(grad_log_probs):
        return None
    active = grad_log_probs != 0
    if grad_entropy is not None:
        active |= grad_entropy != 0
    return None if active.all() else active.nonzero().squeeze(1)


def _kernel(hidden: Tensor, weight: Tensor) -> ModuleType | None:
    """The Triton kernels, where they can run; rows of hidden and weight must lie one after another."""
    if not (hidden.is_cuda and hidden.dtype in (torch.bfloat16, torch.float16) and _has_triton()):
        return None
    return _triton_kernels() if hidden.is_contiguous() and weight.is_contiguous() else None


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _triton_kernels() -> ModuleType:
    from nemo_disco.policy import log_probs_kernel

    return log_probs_kernel


def _may_look(tensor: Tensor) -> bool:
    """Whether its values are at hand. A GPU's would have to be waited for, in the middle of the micro-batches."""
    return tensor.is_cpu


def _accumulate_gradients(
    tokens: _Tokens, weight: Tensor, scale: float, grad_hidden: Tensor | None, grad_weight: Tensor | None
) -> None:
    """Add to grad_hidden [n, h] (float32 or float64) and write grad_weight (its first rows, in the weight's dtype).

    Vocabulary outside, tokens inside: a float32 sum for a bf16 weight is then needed for one tile of it at a time.
    """
    kernel = _kernel(tokens.hidden, weight)
    scratch = _Scratch(tokens.hidden, weight, 0 if kernel else 1 if tokens.grad_entropy is None else 2)
    for columns in _spans(len(weight), scratch.tile.vocab):
        grad_columns = (
            torch.zeros_like(weight[columns], dtype=tokens.log_norm.dtype) if grad_weight is not None else None
        )
        for rows in _spans(len(tokens.hidden), scratch.tile.tokens):
            block = tokens.pick(rows)
            if kernel is None:
                logits, spare = scratch.logits(block.hidden, weight[columns], scale)
                grad = _logit_gradients(logits, spare, block, columns.start).to(weight.dtype)
            else:
                here = block._replace(targets=block.targets - columns.start)
                grad = weight.new_empty(len(here.hidden), columns.stop - columns.start)
                kernel.logit_gradients(here.hidden, weight[columns], *here[1:], scale=scale, out=grad)
            if grad_hidden is not None:
                _add_product(grad_hidden[rows], grad, weight[columns])
            if grad_columns is not None:
                _add_product(grad_columns, grad.T, block.hidden)
        if grad_weight is not None and grad_columns is not None:
            grad_weight[columns] = grad_columns


def _logit_gradients(logits: Tensor, spare: Tensor | None, tokens: _Tokens, first: int) -> Tensor:
    """Turn a tile of logits, in place, into the gradient with respect to them; `first` is its first vocabulary row."""
    index, inside = _locate(tokens.targets - first, logits.size(1))
    log_p = logits.sub_(tokens.log_norm.unsqueeze(1))
    outer = tokens.grad_log_probs.unsqueeze(1)
    if tokens.grad_entropy is None or tokens.entropy is None or spare is None:
        grad = log_p.exp_().mul_(-outer)
    else:
        p = torch.exp(log_p, out=spare)
        grad = log_p.add_(tokens.entropy.unsqueeze(1)).mul_(-tokens.grad_entropy.unsqueeze(1)).sub_(outer).mul_(p)
    return grad.scatter_add_(1, index, outer.masked_fill(~inside.unsqueeze(1), 0))


class _Scratch:
    """The buffers of one tile, made once: every tile's logits lie in the same memory."""

    def __init__(self, hidden: Tensor, weight: Tensor, buffers: int) -> None:
        self.tile = _CUDA_TILE if hidden.is_cuda else _CPU_TILE
        size = min(self.tile.tokens, len(hidden)) * min(self.tile.vocab, len(weight))
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        self.buffers = [torch.empty(size, dtype=dtype, device=hidden.device) for _ in range(buffers)]

    def logits(self, hidden: Tensor, weight: Tensor, scale: float) -> tuple[Tensor, Tensor | None]:
        """hidden @ weight.T * scale, and a second buffer of its shape if there is one."""
        shape = len(hidden), len(weight)
        logits, *spare = (b[: shape[0] * shape[1]].view(shape) for b in self.buffers)
        if hidden.dtype == logits.dtype:
            logits.addmm_(hidden, weight.T, beta=0, alpha=scale)
        elif hidden.is_cuda:  # in half precision alone the product would be rounded to it: 0.03 in a logit of 16
            torch.mm(hidden, weight.T, out_dtype=logits.dtype, out=logits).mul_(scale)
        else:
            logits.copy_(hidden @ weight.T).mul_(scale)
        return logits, spare[0] if spare else None


def _locate(targets: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """[r, 1] column indices that are safe for gather and scatter, and [r] whether the target is among the columns."""
    return targets.clamp(0, size - 1).unsqueeze(1), (targets >= 0) & (targets < size)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
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
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.size(1) != weight.size(1) or targets.shape != hidden.shape[:1]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (hidden, weight, targets))
        raise ValueError(f"log-probs need hidden [n, h], weight [v, h] and targets [n], not {shapes}")
    if hidden.dtype != weight.dtype or not hidden.is_floating_point() or targets.dtype != torch.int64:
        dtypes = f"{hidden.dtype}, {weight.dtype}, {targets.dtype}"
        raise ValueError(f"log-probs need hidden and weight of one floating dtype and int64 targets, not {dtypes}")
    if _may_look(targets) and len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < vocab_size:
        found = f"{int(targets.min())} to {int(targets.max())}"
        raise ValueError(f"targets must be token ids below the vocabulary size {vocab_size}, found {found}")
