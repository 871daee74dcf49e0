"""The distributed optimizer's state in a checkpoint: from each rank's pieces to whole parameters, and back.

The format is megatron-core's "fully_reshardable", whose own functions gather the whole state on every data-parallel
rank, to save and to load. Here the rank that has most of a parameter writes it, and the ranks with a piece read it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from torch import Tensor

NAMES = ("param", "exp_avg", "exp_avg_sq")
# A model's parameter -> this rank's piece of its float32 weight and of its moments, flat.
Shards = dict[Tensor, dict[str, Tensor]]


def shards(part: Any, *, copied: bool) -> Shards:
    """This rank's pieces of the moments and of the float32 weights, except weights that are the model's own.

    part: megatron's DistributedOptimizer. copied: return copies on the host, not the live tensors.
    """
    ranges = [bucket for buffer in part.gbuf_ranges for buckets in buffer.values() for bucket in buckets]
    pieces: Shards = {}
    for p in (p for bucket in ranges for p in bucket["param_map"]):
        state = part._get_main_param_and_optimizer_states(p)
        tensors = {name: state[name].detach() for name in NAMES if not (name == "param" and _is_main(p))}
        pieces[p] = {name: t.to("cpu", copy=True) if copied else t for name, t in tensors.items()}
    return pieces


def assemble(part: Any, model_state: dict[str, Any], own: Shards) -> dict[int, dict[str, Any]]:
    """megatron's sharded tensors of the whole parameters that this rank writes, by the parameter's number.

    model_state: the model's own sharded state. own: this rank's `shards`, which are removed as they are sent. A
    collective of the data-parallel ranks, over gloo; a rank receives about its share of the state.
    """
    group = part.data_parallel_group_gloo
    places = _by_parameter(model_state)
    state: dict[int, dict[str, Any]] = {}
    for number, p, pieces in _parameters(part):
        owner, tensors = _owner(pieces), own.pop(p, {})
        for name in NAMES:
            if name == "param" and _is_main(p):
                whole = p.detach().view(-1) if group.rank() == owner else None
            else:
                whole = _gather(tensors.pop(name, None), pieces, owner, group)
            if whole is not None:
                state.setdefault(number, {})[name] = _sharded(places[p], name, whole, replica=0)
    return state


def loadable(part: Any, model_state: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Uninitialised sharded tensors, to be filled from a checkpoint, of parameters of which this rank has a piece."""
    rank, places = part.data_parallel_group_gloo.rank(), _by_parameter(model_state)
    state = {}
    for number, p, pieces in _parameters(part):
        if any(piece.rank == rank for piece in pieces):
            replica = 0 if rank == _owner(pieces) else 1 + rank
            whole = {name: torch.empty(p.numel(), dtype=torch.float32) for name in NAMES}
            state[number] = {name: _sharded(places[p], name, t, replica) for name, t in whole.items()}
    return state


@torch.no_grad()
def load(part: Any, state: dict[int, dict[str, Tensor]]) -> None:
    """Copy this rank's pieces from the filled tensors of `loadable` into the optimizer."""
    rank = part.data_parallel_group_gloo.rank()
    for number, p, pieces in _parameters(part):
        for piece in (piece for piece in pieces if piece.rank == rank):
            own = {name: tensor.flatten()[piece.start : piece.stop] for name, tensor in state[number].items()}
            part._set_main_param_and_optimizer_states(p, own)


@dataclass(frozen=True)
class _Piece:
    """Elements start to stop - 1 of a flat parameter, which one data-parallel rank has."""

    rank: int
    start: int
    stop: int


def _is_main(p: Tensor) -> bool:
    """True if the optimizer changes the model's parameter itself, without a float32 weight beside it."""
    return p.dtype is torch.float32


def _by_parameter(model_state: dict[str, Any]) -> dict[Tensor, Any]:
    """The sharded tensor (or factory) of each parameter of the model."""
    return {t.data: t for t in nested_values(extract_sharded_tensors_and_factories(model_state)[0])}


def _parameters(part: Any) -> Iterator[tuple[int, Tensor, list[_Piece]]]:
    """Number, parameter and pieces of each parameter of the optimizer, in the same order on all its ranks."""
    number, ranks = 0, part.data_parallel_group_gloo.size()
    for buffer in part.buffers:
        for p, (start, end, bucket) in buffer.param_index_map.items():
            yield number, p, _pieces(buffer.buckets[bucket], start, end, ranks)
            number += 1


def _owner(pieces: list[_Piece]) -> int:
    """The rank that has the most of a parameter."""
    return max(pieces, key=lambda piece: piece.stop - piece.start).rank


def _pieces(bucket: Any, start: int, end: int, ranks: int) -> list[_Piece]:
    """The pieces of the parameter at start .. end of a buffer: each rank has an equal share of its bucket."""
    share = bucket.grad_data.numel() // ranks
    starts = [bucket.offset + rank * share for rank in range(ranks)]
    spans = [(rank, max(first, start), min(first + share, end)) for rank, first in enumerate(starts)]
    return [_Piece(rank, low - start, high - start) for rank, low, high in spans if low < high]


def _gather(piece: Tensor | None, pieces: list[_Piece], owner: int, group: dist.ProcessGroup) -> Tensor | None:
    """The whole tensor [n] on the owner, float32, on the host if it was in pieces; None on the other ranks."""
    rank = group.rank()
    if rank != owner:
        if piece is not None:
            dist.send(piece.to("cpu", torch.float32), group=group, group_dst=owner)
        return None
    assert piece is not None, "the owner has the largest piece"
    if len(pieces) == 1:
        return piece.float()
    whole = torch.empty(pieces[-1].stop, dtype=torch.float32)
    for part in pieces:
        target = whole[part.start : part.stop]
        if part.rank == rank:
            target.copy_(piece)
        else:
            dist.recv(target, group=group, group_src=part.rank)
    return whole


def _sharded(parameter: Any, name: str, whole: Tensor, replica: int) -> Any:
    """A sharded tensor of optimizer state, laid out as the parameter's own. replica: 0 on the rank that writes it."""
    changes: dict[str, Any] = {
        "key": f"optimizer.state.{name}.{parameter.key}",
        "data": whole.reshape(parameter.data.shape),
        "replica_id": (*parameter.replica_id[:-1], replica),
    }
    if not isinstance(parameter, ShardedTensorFactory):
        changes["dtype"] = whole.dtype
    return replace(parameter, **changes)
