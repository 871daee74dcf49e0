"""Micro-batches: which tokens go through the model together, as the tensors that the model takes.

Built from the step's Rollouts and the packing plan, both of which every rank has; nothing is communicated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_disco.data.rollouts import Rollouts
from nemo_disco.policy.attention import PackedSequences


@dataclass(frozen=True)
class MicroBatch:
    """S tokens of packed sequences, n of which predict a response token.

    input_ids, position_ids [1, S]; rows [n]: positions whose next token is a response token; targets [n]: that token;
    index [n]: where it stands in a vector over the T response tokens of the rollouts.
    """

    input_ids: Tensor
    position_ids: Tensor
    sequences: PackedSequences
    rows: Tensor
    targets: Tensor
    index: Tensor


def sequence_lengths(rollouts: Rollouts) -> list[int]:
    """[N] tokens that each response needs the model to read: all but the last, which predicts nothing; 0 for an empty
    response, which has no log-prob and is left out of the micro-batches."""
    lengths = torch.where(rollouts.response_lengths > 0, rollouts.total_lengths - 1, 0)
    return [int(n) for n in lengths]


def build_micro_batch(
    rollouts: Rollouts, responses: Sequence[int], *, multiple: int, device: torch.device
) -> MicroBatch:
    """Pack `responses`, shortest first (neighbours share an attention call), padded to a multiple of `multiple` tokens
    with a sequence that predicts nothing."""
    needed = sequence_lengths(rollouts)
    order = sorted(responses, key=lambda i: (needed[i], i))
    lengths = [needed[i] for i in order]
    padding = -sum(lengths) % multiple if lengths else multiple
    starts = [int(rollouts.token_offsets[i]) for i in order]
    tokens = [rollouts.tokens[s : s + n] for s, n in zip(starts, lengths, strict=True)]
    padded = [*lengths, padding] if padding else lengths
    rows, offset = [], 0
    for i, n in zip(order, lengths, strict=True):
        rows.append(torch.arange(offset + int(rollouts.prompt_lengths[i]) - 1, offset + n))
        offset += n
    nothing = torch.zeros(0, dtype=torch.int64)
    return MicroBatch(
        input_ids=torch.cat([*tokens, torch.zeros(padding, dtype=torch.int64)])[None].to(device),
        position_ids=torch.cat([torch.arange(n) for n in padded])[None].to(device),
        sequences=PackedSequences.from_lengths(padded, device),
        rows=torch.cat([nothing, *rows]).to(device),
        targets=torch.cat([nothing, *(rollouts.response(i) for i in order)]).to(device),
        index=rollouts.token_index(order).to(device),
    )
