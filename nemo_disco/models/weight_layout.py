"""Weights from Hugging Face's layout to megatron-core's and back, whole or as the shards of tensor-parallel ranks.

Pure functions of tensors and a ModelWeight. A shard consists of the same share of every block, so that both directions
cut and join blocks, never rows of a whole megatron-core tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_disco.models.shape import ModelWeight


def shard(weight: ModelWeight, parts: Sequence[Tensor], rank: int = 0, ranks: int = 1) -> Tensor:
    """The megatron-core tensor of tensor-parallel rank `rank` of `ranks`, from the weight's Hugging Face tensors.

    A vocabulary that `ranks` does not divide gets rows of zeros. Memory: none for a single block, where the shard
    can be a view of it; else that of the shard.
    """
    blocks = list(parts) if len(parts) == len(weight.blocks) else list(torch.split(parts[0], list(weight.blocks)))
    if weight.split is not None:
        rows = [-block.shape[0] % ranks if weight.split == 0 else 0 for block in blocks]
        blocks = [F.pad(block, (0, 0, 0, more)) if more else block for block, more in zip(blocks, rows, strict=True)]
        blocks = [block.chunk(ranks, dim=weight.split)[rank] for block in blocks]
    if len(blocks) == 1:
        return blocks[0]
    groups = max(1, weight.groups // ranks)
    return torch.cat([block.reshape(groups, -1, *block.shape[1:]) for block in blocks], dim=1).flatten(0, 1)


def unshard(weight: ModelWeight, shards: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The name of each Hugging Face tensor of the weight, and the tensor itself, from the shards of all ranks.

    Views of a single shard where that is possible; else the memory of one tensor at a time.
    """
    if weight.split is None:
        shards = shards[:1]
    split = [_blocks(weight, shard, len(shards)) for shard in shards]
    blocks = (
        (pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=weight.split or 0))[:rows]
        for rows, pieces in zip(weight.blocks, zip(*split, strict=True), strict=True)
    )
    names = [name for name, _ in weight.parts]
    yield from zip(names, blocks if len(names) == len(weight.blocks) else [torch.cat([*blocks])], strict=True)


def _blocks(weight: ModelWeight, shard: Tensor, ranks: int) -> list[Tensor]:
    """The shares of the blocks in one rank's shard."""
    if len(weight.blocks) == 1:
        return [shard]
    groups = max(1, weight.groups // ranks)
    grouped = shard.reshape(groups, -1, *shard.shape[1:])
    rows = [block * grouped.shape[1] // weight.shape[0] for block in weight.blocks]
    return [part.flatten(0, 1) for part in torch.split(grouped, rows, dim=1)]
