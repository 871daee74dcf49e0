"""Model FLOPs of sequences, exactly, and what a GPU's datasheet promises: MFU's numerator and denominator.

Pure arithmetic; must not import torch. A multiply-add is two. Recomputation is not counted (that is what makes it MFU).
"""

from __future__ import annotations

from collections.abc import Iterable

from nemo_disco.models.shape import ModelShape

# A backward pass multiplies each matrix twice: for the gradient of its input and of itself.
TRAINING = 3

# Dense BF16 FLOP/s of the datasheets (SXM boards; PCIe where named). The first name that a device's contains counts.
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
    """One forward pass over packed sequences of so many tokens, with the output layer at `predicted` positions.

    Attention is causal: token i attends to i tokens, so a sequence of n takes n (n + 1) / 2 pairs, each of which
    costs a multiply-add in q k^T and one in p v for every number of a query. Padding is not work.
    """
    lengths = list(lengths)
    pairs = sum(n * (n + 1) // 2 for n in lengths)
    attention = 4 * shape.layers * shape.query_width * pairs
    matrices = shape.layers * shape.matrix_parameters * sum(lengths) + shape.vocab * shape.hidden * predicted
    return 2 * matrices + attention


def peak_flops(device: str) -> float | None:
    """Dense BF16 FLOP/s of a device by the name that CUDA gives it; None for one that is not known."""
    # The longest name first: H200 is not an H20.
    return next((DATASHEET[name] for name in sorted(DATASHEET, key=len, reverse=True) if name in device), None)
