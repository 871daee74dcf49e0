"""FLOPs of the model for given sequences, exact, and peak FLOP/s of GPUs: numerator and denominator of MFU.

Pure arithmetic; must not import torch. A multiply-add is two FLOPs. As MFU is defined, recomputation does not count.
"""

from __future__ import annotations

from collections.abc import Iterable

from nemo_disco.models.shape import ModelShape

# FLOPs of forward and backward per forward: backward has two products per matrix, for its input's gradient and its own.
TRAINING = 3

# Dense BF16 FLOP/s of the datasheets (SXM boards; PCIe where named), by a part of the device's name.
DATASHEET = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H800": 989e12,
    "H20": 148e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
}


def forward_flops(shape: ModelShape, lengths: Iterable[int], predicted: int) -> int:
    """FLOPs of a forward pass over packed sequences of these lengths, with the output layer at `predicted` positions.

    Attention is causal: token i attends to i tokens, or to the last w of them in a layer with a sliding window of w.
    Each pair has a multiply-add in q k^T and one in p v for every element of a query. Padding does not count.
    """
    lengths = list(lengths)
    windowed = sum(shape.windowed)
    pairs = (shape.layers - windowed) * sum(_pairs(n, n) for n in lengths)
    pairs += windowed * sum(_pairs(n, shape.window or n) for n in lengths)
    attention = 4 * shape.query_width * pairs
    matrices = shape.layers * shape.matrix_parameters * sum(lengths) + shape.vocab * shape.hidden * predicted
    return 2 * matrices + attention


def _pairs(length: int, window: int) -> int:
    """Pairs of a token and one that it attends to, in a sequence of that many tokens."""
    whole = min(length, window)
    return whole * (whole + 1) // 2 + (length - whole) * window


def peak_flops(device: str) -> float | None:
    """Dense BF16 FLOP/s of a device by its CUDA name; None for an unknown one."""
    # The longest name first: H200 is not an H20.
    return next((DATASHEET[name] for name in sorted(DATASHEET, key=len, reverse=True) if name in device), None)
