"""The function that each process of the fixture `run_on_ranks` runs.

It is not in the fixture's conftest.py: every conftest.py is the module `conftest`, so that a spawned process could look
for the function in the conftest.py of another directory.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run_rank(
    rank: int, world_size: int, meeting: Path, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    """Call the function as this rank of a process group, and save its result in the file MEETING.RANK.

    meeting: a path at which the ranks of the group find each other.
    """
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size)
    torch.save(function(*arguments), meeting.with_suffix(f".{rank}"))
    dist.barrier()
    dist.destroy_process_group()
