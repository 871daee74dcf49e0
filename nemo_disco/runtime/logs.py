"""Logging of a process of the run: lines on stderr with the rank, and fewer messages of libraries.

Touches the root logger, Python's warning filters and transformers' verbosity variable. Must not import torch.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import TextIO

# Libraries whose warnings are left out; `nemo-disco doctor` lists missing kernels in full.
NOISY = (
    "apex",
    "datasets",
    "filelock",
    "fsspec",
    "huggingface_hub",
    "math_verify",
    "latex2sympy2_extended",
    "matplotlib",
)
LIBRARIES = ("megatron", "torch", "transformer_engine", "transformers")


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to the present sys.stderr, so that log lines go through a live display that has replaced it."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


def setup_logging(rank: int = 0, world_size: int = 1, level: int = logging.INFO) -> None:
    """Set up the root logger. Call it before the heavy imports: megatron-core warns while it is imported.

    Rank 0 logs from `level` and the other ranks from WARNING, so that a message does not appear once per rank. The
    libraries in NOISY and LIBRARIES log only errors.
    """
    handler = _Stderr()
    prefix = f"[rank {rank}] " if world_size > 1 else ""
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(levelname)s %(message)s", datefmt="%H:%M:%S"))
    root = logging.getLogger()
    for earlier in [h for h in root.handlers if isinstance(h, _Stderr)]:
        root.removeHandler(earlier)
    root.addHandler(handler)
    root.setLevel(level if rank == 0 else max(level, logging.WARNING))

    logging.captureWarnings(True)
    for name in (*NOISY, *LIBRARIES):
        logging.getLogger(name).setLevel(logging.ERROR)
    # transformers replaces its logger's level at its first import.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", module=rf"({'|'.join((*NOISY, *LIBRARIES))})(\.|$)")
