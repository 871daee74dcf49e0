"""Weights from Hugging Face's layout to megatron-core's and back, whole or as the shards of tensor-parallel ranks.

Pure functions of tensors and a ModelWeight. A shard consists of the same share of every part, so that both directions
cut and join parts, never rows of a whole megatron-core tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_disco.models.shape import ModelWeight


def shard(weight: ModelWeight, parts: Sequence[Tensor], rank: int = 0, ranks: int = 1) -> Tensor:
    """The megatron-core tensor of tensor-parallel rank `rank` of `ranks`, from the weight's Hugging Face tensors.

    A vocabulary that `ranks` does not divide gets rows of zeros. Memory: none for a single part, where the shard can be
    a view of it; else that of the shard.
    """
    if weight.split is not None:
        rows = [-part.shape[0] % ranks if weight.split == 0 else 0 for part in parts]
        parts = [F.pad(part, (0, 0, 0, more)) if more else part for part, more in zip(parts, rows, strict=True)]
        parts = [part.chunk(ranks, dim=weight.split)[rank] for part in parts]
    if len(parts) == 1:
        return parts[0]
    groups = max(1, weight.groups // ranks)
    return torch.cat([part.reshape(groups, -1, *part.shape[1:]) for part in parts], dim=1).flatten(0, 1)


def unshard(weight: ModelWeight, shards: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The name of each Hugging Face tensor of the weight, and the tensor itself, from the shards of all ranks.

    Views of a single shard where that is possible; else the memory of one tensor at a time.
    """
    if weight.split is None:
        shards = shards[:1]
    split = [_parts(weight, shard, len(shards)) for shard in shards]
    for index, (name, shape) in enumerate(weight.parts):
        pieces = [parts[index] for parts in split]
        whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=weight.split or 0)
        yield name, whole[: shape[0]]


def _parts(weight: ModelWeight, shard: Tensor, ranks: int) -> list[Tensor]:
    """The shares of the parts in one rank's shard."""
    if len(weight.parts) == 1:
        return [shard]
    groups = max(1, weight.groups // ranks)
    grouped = shard.reshape(groups, -1, *shard.shape[1:])
    rows = [shape[0] * grouped.shape[1] // weight.shape[0] for _, shape in weight.parts]
    return [part.flatten(0, 1) for part in torch.split(grouped, rows, dim=1)]
