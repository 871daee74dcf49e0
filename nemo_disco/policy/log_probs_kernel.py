"""Triton kernels of the log-probs: logits stay in registers and are never written to memory. Not run on a GPU.

Forward: per-token statistics of a vocabulary shard. Backward: a tile of the gradient with respect to the logits, which
are computed again; cuBLAS multiplies it. `make test-triton` runs them in Triton's interpreter and compiles them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Tile of a program (tokens, vocabulary rows, hidden numbers) and its launch: the largest that ptxas fits into Hopper's
# registers (sm_90: hardly any spills, loads pipelined, wgmma). Speed: not measured; benchmarks/gpu compares.
FORWARD = {"BLOCK_N": 128, "BLOCK_V": 256, "BLOCK_H": 64, "num_warps": 8, "num_stages": 3}
BACKWARD = {"BLOCK_N": 128, "BLOCK_V": 128, "BLOCK_H": 64, "num_warps": 8, "num_stages": 4}
# A gradient tile as large as the forward one: it fits as well, and reads a third fewer bytes for the same products.
WIDE_BACKWARD = FORWARD
GATHER = {"BLOCK_N": 16, "BLOCK_H": 256, "num_warps": 4, "num_stages": 2}
# Half of the lowest float32: differences from it are finite, and their exp is 0.
_FLOOR = tl.constexpr(-1.7e38)
# Programs per multiprocessor in a launch, so that little is idle while the last ones run.
_WAVES = 4
# Programs start in the order of the first grid axis. True: it is the splits of the vocabulary, at least _LEAST_SPLITS;
# programs that run together then share few token blocks, which stay in the L2 cache, and read each weight at about one
# time. False: it is the token blocks, which exceed the L2 cache and are read again for every tile of weights.
SPLITS_FIRST = True
_LEAST_SPLITS = 12


@triton.jit
def _logits(hidden, weight, rows, columns, n, size, WIDTH: tl.constexpr, BLOCK_H: tl.constexpr):
    """hidden[rows] @ weight[columns].T in float32; 0 for rows from n and columns from size on."""
    total = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    for start in range(0, WIDTH, BLOCK_H):
        inner = start + tl.arange(0, BLOCK_H)
        a = tl.load(
            hidden + rows[:, None].to(tl.int64) * WIDTH + inner[None, :],
            mask=(rows[:, None] < n) & (inner[None, :] < WIDTH),
            other=0.0,
        )
        b = tl.load(
            weight + columns[None, :].to(tl.int64) * WIDTH + inner[:, None],
            mask=(columns[None, :] < size) & (inner[:, None] < WIDTH),
            other=0.0,
        )
        total = tl.dot(a, b, total, input_precision="ieee")
    return total


# n and share are neither constants nor specialised by their divisors: each new value would need a compilation.
@triton.jit(do_not_specialize=["n", "share"])
def _statistics(
    hidden, weight, out, n, size, share, scale,
    WIDTH: tl.constexpr, TARGETS: tl.constexpr, ENTROPIES: tl.constexpr, SPLITS_FIRST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Write to the first three rows of out [splits, 3 + TARGETS, n] the statistics of log_probs._local_statistics of
    each `share` vocabulary rows."""
    split, block = tl.program_id(0 if SPLITS_FIRST else 1), tl.program_id(1 if SPLITS_FIRST else 0)
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
    first = split * share
    place = out + split.to(tl.int64) * (3 + TARGETS) * n + rows
    top = tl.full((BLOCK_N,), _FLOOR, tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    weighted = tl.zeros((BLOCK_N,), tl.float32)
    start = 0
    while start < share:
        columns = first + start + tl.arange(0, BLOCK_V)
        x = scale * _logits(hidden, weight, rows, columns, n, size, WIDTH, BLOCK_H)
        real = (columns < size)[None, :]
        x = tl.where(real, x, _FLOOR)
        higher = tl.maximum(top, tl.max(x, 1))
        shift = top - higher
        x -= higher[:, None]
        e = tl.where(real, tl.exp(x), 0.0)
        if ENTROPIES:
            weighted = tl.exp(shift) * (weighted + shift * total) + tl.sum(e * x, 1)
        total = tl.exp(shift) * total + tl.sum(e, 1)
        top = higher
        start += BLOCK_V
    tl.store(place, top, mask=rows < n)
    tl.store(place + n, total, mask=rows < n)
    tl.store(place + 2 * n, weighted, mask=rows < n)


@triton.jit(do_not_specialize=["n"])
def _target_logits(
    hidden, weight, targets, out, n, size, scale,
    WIDTH: tl.constexpr, TARGETS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Write to out[3 + j, n], j the second grid axis, scale * hidden[t] . weight[targets[t, j]]; nothing for targets
    outside the weight. Beside the products of all rows, reading a few of them again is cheap."""
    rows, j = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1)
    target = tl.load(targets + rows * TARGETS + j, mask=rows < n, other=-1)
    inside = (target >= 0) & (target < size)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, WIDTH, BLOCK_H):
        inner = start + tl.arange(0, BLOCK_H)
        mask = inside[:, None] & (inner[None, :] < WIDTH)
        a = tl.load(hidden + rows[:, None].to(tl.int64) * WIDTH + inner[None, :], mask=mask, other=0.0)
        b = tl.load(weight + target[:, None] * WIDTH + inner[None, :], mask=mask, other=0.0)
        total += tl.sum(a.to(tl.float32) * b.to(tl.float32), 1)
    tl.store(out + (3 + j).to(tl.int64) * n + rows, scale * total, mask=inside)


@triton.jit(do_not_specialize=["n"])
def _gradients(
    hidden, weight, targets, log_norm, grad_log_probs, grad_sum, grad_entropy, entropy, out, n, size, scale,
    WIDTH: tl.constexpr, TARGETS: tl.constexpr, ENTROPIES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Write to out [n, size] the gradient by logits, sum_j g_j ([v = t_j] - p_v) - g_H p_v (log p_v + H), in out's
    dtype. targets and grad_log_probs g are [n, TARGETS], and grad_sum [n] is sum_j g_j."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    target = tl.load(targets + rows * TARGETS, mask=rows < n, other=-1)
    norm = tl.load(log_norm + rows, mask=rows < n, other=0.0)
    outer = tl.load(grad_sum + rows, mask=rows < n, other=0.0)
    first = outer if TARGETS == 1 else tl.load(grad_log_probs + rows * TARGETS, mask=rows < n, other=0.0)
    logits = _logits(hidden, weight, rows, columns, n, size, WIDTH, BLOCK_H)
    log_p = scale * logits - norm[:, None]
    factor = -outer[:, None]
    if ENTROPIES:
        outer_entropy = tl.load(grad_entropy + rows, mask=rows < n, other=0.0)
        h = tl.load(entropy + rows, mask=rows < n, other=0.0)
        factor = factor - outer_entropy[:, None] * (log_p + h[:, None])
    grad = factor * tl.exp(log_p) + tl.where(columns[None, :] == target[:, None], first[:, None], 0.0)
    for j in range(1, TARGETS):
        other = tl.load(targets + rows * TARGETS + j, mask=rows < n, other=-1)
        g = tl.load(grad_log_probs + rows * TARGETS + j, mask=rows < n, other=0.0)
        grad += tl.where(columns[None, :] == other[:, None], g[:, None], 0.0)
    place = out + rows[:, None].to(tl.int64) * size + columns[None, :]
    tl.store(place, grad.to(out.dtype.element_ty), mask=(rows[:, None] < n) & (columns[None, :] < size))


def statistics(hidden: Tensor, weight: Tensor, targets: Tensor, scale: float, entropies: bool) -> Tensor:
    """[splits, 3 + m, n] float32 statistics, one split per part of the vocabulary. With x = logits * scale of the part:
    the maximum top of x, sum exp(x - top), sum exp(x - top) (x - top), and x at each of the m targets (0 if in another
    part).

    hidden [n, h] and weight [v, h] are contiguous; targets [n, m] int64 count from the weight's first row.
    """
    n, size = len(hidden), len(weight)
    blocks, tiles = triton.cdiv(n, FORWARD["BLOCK_N"]), triton.cdiv(size, FORWARD["BLOCK_V"])
    least = _LEAST_SPLITS if SPLITS_FIRST else 1
    splits = min(tiles, max(least, triton.cdiv(_WAVES * _multiprocessors(hidden), max(1, blocks))))
    share = triton.cdiv(tiles, splits) * FORWARD["BLOCK_V"]
    splits = triton.cdiv(size, share)
    out = torch.zeros(splits, 3 + targets.size(1), n, dtype=torch.float32, device=hidden.device)
    _statistics[(splits, blocks) if SPLITS_FIRST else (blocks, splits)](
        hidden, weight, out, n, size, share, scale,
        WIDTH=hidden.shape[1], TARGETS=targets.size(1), ENTROPIES=entropies, SPLITS_FIRST=SPLITS_FIRST, **FORWARD,
    )  # fmt: skip
    # Into the first split's rows; those of the others stay 0.
    _target_logits[(triton.cdiv(n, GATHER["BLOCK_N"]), targets.size(1))](
        hidden, weight, targets.contiguous(), out, n, size, scale,
        WIDTH=hidden.shape[1], TARGETS=targets.size(1), **GATHER,
    )  # fmt: skip
    return out


def logit_gradients(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    log_norm: Tensor,
    grad_log_probs: Tensor,
    grad_entropy: Tensor | None,
    entropy: Tensor | None,
    scale: float,
    out: Tensor,
) -> Tensor:
    """Write to out [n, v] the gradient with respect to the logits of a tile, and return it. All are contiguous.

    targets [n, m]; grad_log_probs [n, m] and grad_entropy [n] float32 already contain the factor `scale` =
    1 / temperature; log_norm [n] is log sum exp of the logits times `scale`."""
    n, size = out.shape
    grid = (triton.cdiv(n, BACKWARD["BLOCK_N"]), triton.cdiv(size, BACKWARD["BLOCK_V"]))
    with_entropy = grad_entropy is not None
    _gradients[grid](
        hidden, weight, targets.contiguous(), log_norm, grad_log_probs.contiguous(), grad_log_probs.sum(1),
        grad_entropy if with_entropy else log_norm, entropy if with_entropy else log_norm, out, n, size, scale,
        WIDTH=hidden.shape[1], TARGETS=targets.size(1), ENTROPIES=with_entropy, **BACKWARD,
    )  # fmt: skip
    return out


def _multiprocessors(tensor: Tensor) -> int:
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 1
