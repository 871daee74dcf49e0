"""Logging for a process of the run: rank-prefixed lines on stderr, and quiet third parties.

Touches the root logger, Python's warning filters and transformers' verbosity variable. Must not import torch.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import TextIO

# What these say about missing kernels, `nemo-disco doctor` says once and in full.
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
LIBRARIES = ("mbridge", "megatron", "torch", "transformer_engine", "transformers")


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to whatever sys.stderr is now, so that a live display which replaces it is not torn by a log line."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


def setup_logging(rank: int = 0, world_size: int = 1, level: int = logging.INFO) -> None:
    """Call once a process, before the heavy imports (megatron-core warns while it is imported).

    Rank 0 logs from `level`, the others warnings only, so that N ranks do not say everything N times. Warnings of the
    libraries that we build on are left out, their errors are not.
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
    # transformers sets its own logger's level at its first import, over ours.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", module=rf"({'|'.join((*NOISY, *LIBRARIES))})(\.|$)")
