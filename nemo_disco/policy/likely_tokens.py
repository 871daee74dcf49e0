"""The likeliest tokens of the old policy, and the KL to it over them: what the constraint's estimator top_k compares.

Touches tensors and a tensor-parallel group alone. The log-probs themselves come from log_probs.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

_TILE = 8192  # vocabulary rows whose logits exist at once, for _ROWS tokens
_ROWS = 512


@dataclass(frozen=True)
class LikelyTokens:
    """The K likeliest tokens of a policy at each of T places: ids [T, K] int32 and their log-probs [T, K].

    complete: K is the whole vocabulary, so that no other token has a probability.
    """

    ids: Tensor
    log_probs: Tensor
    complete: bool

    def select(self, index: Tensor) -> LikelyTokens:
        """Those of the places at index [n]."""
        index = index.to(self.ids.device)
        return LikelyTokens(self.ids[index], self.log_probs[index], self.complete)


@torch.no_grad()
def find_likely_tokens(
    hidden: Tensor,
    weight: Tensor,
    count: int,
    *,
    vocab_size: int,
    vocab_start: int = 0,
    tp_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """[n, count] int64 ids of the largest logits hidden @ weight.T, tile by tile; the likeliest first.

    hidden [n, h]; weight [v_local, h] and the other arguments as in log_probs.token_log_probs. The same ids on every
    rank of tp_group. Raises ValueError if count is not between 1 and vocab_size.
    """
    if not 1 <= count <= vocab_size:
        raise ValueError(f"{count} likely tokens were asked for, of a vocabulary of {vocab_size}")
    weight = weight[: min(max(vocab_size - vocab_start, 0), len(weight))]
    values = hidden.new_full((len(hidden), count), -torch.inf, dtype=torch.promote_types(hidden.dtype, torch.float32))
    ids = torch.zeros_like(values, dtype=torch.int64)
    for first in range(0, len(hidden), _ROWS):
        rows = slice(first, first + _ROWS)
        for start in range(0, len(weight), _TILE):
            logits = _logits(hidden[rows], weight[start : start + _TILE])
            top = logits.topk(min(count, logits.size(1)), 1)
            _keep_largest(values[rows], ids[rows], top.values, top.indices + (vocab_start + start))
    if tp_group is not None and dist.get_world_size(tp_group) > 1 and len(hidden):
        shards = [torch.empty_like(x) for x in (values, ids) for _ in range(dist.get_world_size(tp_group))]
        ranks = len(shards) // 2
        dist.all_gather(shards[:ranks], values, group=tp_group)
        dist.all_gather(shards[ranks:], ids, group=tp_group)
        order = torch.cat(shards[:ranks], 1).topk(count, 1).indices
        ids = torch.cat(shards[ranks:], 1).gather(1, order)
    return ids


def token_divergences(log_probs: Tensor, old: LikelyTokens) -> Tensor:
    """[n] KL(old || policy) at each place, in nats: sum_k q_k (log q_k - log p_k), and the term q log(q / p) of one
    bucket of all other tokens (none if `old` is complete). By the data processing inequality it is at most the KL over
    the vocabulary.

    log_probs [n, K]: log p of the current policy at old.ids, differentiable. Where a bucket's probability is below what
    its dtype can tell from 0, it counts as that smallest amount and has no gradient.
    """
    q = old.log_probs.exp()
    kl = (q * (old.log_probs - log_probs)).sum(1)
    if old.complete:
        return kl
    least = 8 * torch.finfo(log_probs.dtype).eps
    q_other = (1 - q.sum(1)).clamp(min=least)
    p_other = (1 - log_probs.exp().sum(1)).clamp(min=least)
    return kl + q_other * (q_other.log() - p_other.log())


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden @ weight.T, on CUDA in float32 for half precision, since rounded logits have ties."""
    if hidden.is_cuda and hidden.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    return hidden @ weight.T


def _keep_largest(values: Tensor, ids: Tensor, more: Tensor, more_ids: Tensor) -> None:
    """Replace values and ids [n, count] in place by the largest of them and of more [n, m]."""
    both, both_ids = torch.cat([values, more.to(values.dtype)], 1), torch.cat([ids, more_ids], 1)
    top = both.topk(values.size(1), 1)
    values.copy_(top.values)
    ids.copy_(both_ids.gather(1, top.indices))
