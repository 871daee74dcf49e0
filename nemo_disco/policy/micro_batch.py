"""Micro-batches: the tokens that go through the model together, as the model's input tensors.

Built from the step's Rollouts and the packing plan, both of which every rank has; nothing is communicated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from nemo_disco.data.packing import round_up
from nemo_disco.data.rollouts import Rollouts
from nemo_disco.policy.attention import PackedSequences
from nemo_disco.policy.likely_tokens import LikelyTokens
from nemo_disco.policy.parallel import Ranks
from nemo_disco.policy.routes import Routes, TokenRoutes


@dataclass(frozen=True)
class MicroBatch:
    """S tokens of packed sequences, n of which predict a response token.

    input_ids, position_ids [1, S]; rows [n]: positions whose next token is a response token; targets [n]: that token;
    index [n]: its index among the T response tokens of the rollouts; old [n]: the likely tokens there to compare with.
    """

    input_ids: Tensor
    position_ids: Tensor
    sequences: PackedSequences
    rows: Tensor
    targets: Tensor
    index: Tensor
    old: LikelyTokens | None = None


@dataclass(frozen=True)
class Padding:
    """Numbers of which the token counts of a sequence and of a micro-batch must be multiples."""

    sequence: int = 1
    micro_batch: int = 1

    @classmethod
    def for_layout(cls, ranks: Ranks, sequence_parallel: bool, fp8_tokens: int) -> Padding:
        """Padding that a layout needs: CP cuts each sequence into 2 CP pieces; under SP the TP ranks share the tokens
        of a CP rank. fp8_tokens: number of which each rank's share must be a multiple."""
        sequence = 2 * ranks.context_size if ranks.context_size > 1 else 1
        shares = ranks.context_size * (ranks.tensor_size if sequence_parallel else 1)
        return cls(sequence, math.lcm(sequence, shares * fp8_tokens))


def sequence_lengths(rollouts: Rollouts) -> list[int]:
    """[N] tokens that the model reads for each response: all but the last, which predicts nothing. 0 for an empty
    response, which has no log-prob and is in no micro-batch."""
    lengths = torch.where(rollouts.response_lengths > 0, rollouts.total_lengths - 1, 0)
    return [int(n) for n in lengths]


def build_micro_batch(
    rollouts: Rollouts,
    responses: Sequence[int],
    *,
    padding: Padding,
    device: torch.device,
    context_rank: int = 0,
    context_size: int = 1,
    old: LikelyTokens | None = None,
    tensor_share: tuple[int, int] = (0, 1),
    routes: Routes | Literal["record"] | None = None,
) -> MicroBatch:
    """Pack the responses with these indices, shortest first (neighbours share an attention call), with padding.

    Under context parallelism: this rank's share of the tokens. old [T]: in host memory. Does not wait for the device.
    routes: of all tokens of the rollouts, which the routers take; or they are recorded. tensor_share: this rank among
    those that share the tokens under sequence parallelism, and their number, for the routes.
    """
    unpadded = sequence_lengths(rollouts)
    order = sorted(responses, key=lambda i: (unpadded[i], i))
    lengths = [round_up(unpadded[i], padding.sequence) for i in order]
    total = max(round_up(sum(lengths), padding.micro_batch), padding.micro_batch)
    if total > sum(lengths):
        lengths.append(total - sum(lengths))  # one more sequence, which predicts nothing
    ids, targets = (torch.zeros(total, dtype=torch.int64) for _ in range(2))
    index, places = (torch.full((total,), -1) for _ in range(2))
    start = 0
    for i, length in zip(order, lengths, strict=False):
        first, n = int(rollouts.token_offsets[i]), unpadded[i]
        ids[start : start + n] = rollouts.tokens[first : first + n]
        places[start : start + n] = torch.arange(first, first + n)
        response = slice(start + int(rollouts.prompt_lengths[i]) - 1, start + n)
        targets[response] = rollouts.response(i)
        index[response] = torch.arange(int(rollouts.response_offsets[i]), int(rollouts.response_offsets[i + 1]))
        start += length
    positions = torch.cat([torch.arange(n) for n in lengths])
    sequences = PackedSequences.from_lengths(lengths, context_rank, context_size)
    local = sequences.local
    if local is not None:
        ids, positions, targets, index, places = (x[local] for x in (ids, positions, targets, index, places))
    if routes is not None:
        rank, size = tensor_share
        sequences.routes = TokenRoutes.of(places.chunk(size)[rank], None if routes == "record" else routes)
    rows = (index >= 0).nonzero()[:, 0]
    likely = None if old is None else old.select(index[rows])
    batch = MicroBatch(ids[None], positions[None], sequences, rows, targets[rows], index[rows], likely)
    return batch if device.type == "cpu" else _send(batch, device)


def _send(value: Any, device: torch.device) -> Any:
    """Copy every tensor in a dataclass or tuple to the device, from page-locked memory so that CUDA does not wait. Not
    run."""
    if isinstance(value, Tensor):
        return value.pin_memory().to(device, non_blocking=True)
    if isinstance(value, tuple):
        return tuple(_send(item, device) for item in value)
    if isinstance(value, dict):
        return {key: _send(item, device) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: _send(getattr(value, field.name), device) for field in fields(value)})
    return value
