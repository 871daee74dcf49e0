"""This machine's best rates, measured in the same run: matrix products, copies, and copies to the host."""

from __future__ import annotations

from typing import Any

import torch
from setting import CUDA, DEVICE, Setting, seconds


def run(setting: Setting) -> dict[str, Any]:
    """Rates of random data (zeros run faster): FLOP/s in bf16, bytes read plus written a second."""
    n = setting.size(8192, 256)
    a, b = (torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    matrix = seconds(lambda: torch.mm(a, b, out=out), repeats=20, warm_up=3)
    source = torch.randint(0, 255, (setting.size(2**32, 2**20),), device=DEVICE, dtype=torch.uint8)
    target = torch.empty_like(source)
    copy = seconds(lambda: target.copy_(source), repeats=10, warm_up=2)
    size = setting.size(2**30, 2**16)
    host = torch.empty(size, dtype=torch.uint8, pin_memory=CUDA)
    down = seconds(lambda: host.copy_(source[:size], non_blocking=True), repeats=5)
    return {
        "matrix_s": matrix,
        "copy_s": copy,
        "matrix_flops": 2 * n**3 / matrix,
        "copy_bytes_per_second": 2 * source.numel() / copy,
        "to_host_bytes_per_second": size / down,
    }
