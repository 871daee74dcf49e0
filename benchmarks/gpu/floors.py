"""Rates that the machine reaches: matrix products, copies on the device, and copies to the host."""

from __future__ import annotations

from typing import Any

import torch
from setting import CUDA, DEVICE, Setting, measure_seconds


def run(setting: Setting) -> dict[str, Any]:
    """Seconds of a matrix product and of a copy, and rates: FLOP/s in bf16, and bytes per second.

    A copy on the device counts bytes read and bytes written, a copy to the host each byte once. The data is random,
    because zeros are multiplied faster.
    """
    n = setting.size(8192, 256)
    a, b = (torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    matrix_s = measure_seconds(lambda: torch.mm(a, b, out=out), repeats=20, warm_up=3)
    source = torch.randint(0, 255, (setting.size(2**32, 2**20),), device=DEVICE, dtype=torch.uint8)
    target = torch.empty_like(source)
    copy_s = measure_seconds(lambda: target.copy_(source), repeats=10, warm_up=2)
    size = setting.size(2**30, 2**16)
    host = torch.empty(size, dtype=torch.uint8, pin_memory=CUDA)
    to_host_s = measure_seconds(lambda: host.copy_(source[:size], non_blocking=True), repeats=5)
    return {
        "matrix_s": matrix_s,
        "copy_s": copy_s,
        "matrix_flops": 2 * n**3 / matrix_s,
        "copy_bytes_per_second": 2 * source.numel() / copy_s,
        "to_host_bytes_per_second": size / to_host_s,
    }
