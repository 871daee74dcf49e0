"""Collectives that give every rank the same outcome, errors included: a rank that failed alone would leave the others
waiting. The functions that they call are their caller's.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def on_every_rank(do: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
    """The results of `do()` on the group's ranks, in order. An error on any of them is raised on all. A collective.

    group: all ranks without it; a thread beside another that uses the default group needs its own.
    """
    if dist.get_world_size(group) == 1:
        return [do()]
    outcome: tuple[T | None, Exception | None]
    try:
        outcome = do(), None
    except Exception as error:
        outcome = None, error
    outcomes: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(outcomes, (outcome[0], _picklable(outcome[1])), group)
    for index, (_, failure) in enumerate(outcomes):
        if failure is not None:
            raise (index == dist.get_rank(group) and outcome[1]) or failure  # the original has a traceback
    return [result for result, _ in outcomes]


def on_first_rank(do: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """The result of `do()` on rank 0, which alone calls it, or its error, on every rank. A collective."""
    return on_every_rank(lambda: do() if dist.get_rank() == 0 else None, group)[0]  # type: ignore[return-value]


def on_shares(count: int, do: Callable[[range], list[T]]) -> list[T]:
    """The results for items 0 to count - 1, in order; each rank computes a share, `do(its indices)`. A collective."""
    rank, size = dist.get_rank(), dist.get_world_size()
    shares = on_every_rank(lambda: do(range(rank, count, size)))
    return [shares[i % size][i // size] for i in range(count)]


def is_first_rank() -> bool:
    """True on rank 0, which alone writes files and prints."""
    return dist.get_rank() == 0


def _picklable(error: Exception | None) -> Exception | None:
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
