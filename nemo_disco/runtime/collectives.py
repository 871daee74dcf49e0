"""Collectives that give every rank the same outcome, errors included: a rank that failed alone would leave the others
waiting. Calls functions of the caller and knows nothing of their work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.signals import StoppedError

T = TypeVar("T")


def every(do: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
    """What `do` returns on each rank, on every rank. What it raises anywhere is raised everywhere. group: of all ranks,
    where the default one is another thread's."""
    mine: tuple[T | None, Exception | None]
    try:
        mine = do(), None
    except Exception as error:
        mine = None, error
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, mine, group)
    for rank, (_, failure) in enumerate(outcomes):
        if failure is not None:
            raise (rank == dist.get_rank() and mine[1]) or failure  # its own has the traceback
    return [value for value, _ in outcomes]


def first(do: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """What `do` returns, or raises, on rank 0; it is done there alone."""
    return every(lambda: do() if dist.get_rank() == 0 else None, group)[0]  # type: ignore[return-value]


def on_shares(count: int, judge: Callable[[range], list[T]]) -> list[T]:
    """What `judge` says of each of `count` responses, each rank asked about its share. What is wrong with a user's
    code, or a StoppedError, is raised on every rank, even if one alone met it. A collective."""
    rank, size = dist.get_rank(), dist.get_world_size()
    mine: list[T] | UserError | StoppedError
    try:
        mine = judge(range(rank, count, size))
    except (UserError, StoppedError) as error:
        mine = error
    shares: list[Any] = [mine] * size
    if size > 1:
        dist.all_gather_object(shares, mine)
    for share in shares:
        if isinstance(share, UserError | StoppedError):
            raise share
    return [shares[i % size][i // size] for i in range(count)]
