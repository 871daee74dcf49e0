"""The function that each process of the fixture `on_ranks` runs.

It is not in the fixture's conftest.py, since every conftest.py is the module `conftest`: a spawned process would look
for this function in that of another directory.
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
    """Call the function within a process group and save its result beside the file `meeting`."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size)
    torch.save(function(*arguments), meeting.with_suffix(f".{rank}"))
    dist.barrier()
    dist.destroy_process_group()
