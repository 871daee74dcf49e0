"""Collectives that give every rank the same outcome, errors included: a rank that failed alone would leave the others
waiting. They call functions of the caller and know nothing of their work.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def every(do: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
    """The results of `do()` on all ranks, by rank. An error on any rank is raised on every rank. A collective.

    group: of all ranks, where the default one is another thread's.
    """
    if dist.get_world_size() == 1:
        return [do()]
    own: tuple[T | None, Exception | None]
    try:
        own = do(), None
    except Exception as error:
        own = None, error
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, (own[0], _picklable(own[1])), group)
    for index, (_, failure) in enumerate(outcomes):
        if failure is not None:
            raise (index == dist.get_rank() and own[1]) or failure  # a rank's own has the traceback
    return [result for result, _ in outcomes]


def first(do: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """The result of `do()` on rank 0, which alone calls it, or its error, on every rank. A collective."""
    return every(lambda: do() if dist.get_rank() == 0 else None, group)[0]  # type: ignore[return-value]


def on_shares(count: int, do: Callable[[range], list[T]]) -> list[T]:
    """The results for items 0 to count - 1, of which each rank computes a share, `do(its indices)`. A collective."""
    rank, size = dist.get_rank(), dist.get_world_size()
    shares = every(lambda: do(range(rank, count, size)))
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
