"""The same outcome on every rank: what one rank returns or raises, all do. A rank that fails alone would leave the
others waiting. Knows nothing of what is done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

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
