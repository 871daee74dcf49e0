"""A stand-in of torch's varlen flash kernel in plain torch, for a machine without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_disco.policy import attention


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool = True,
) -> Tensor:
    """Ragged attention, [T_q, H, D], with the causal mask aligned to the last query and key of each piece."""
    assert window_size == (-1, 0) and enable_gqa
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert (max_q, max_k) == (int(cu_seq_q.diff().max()), int(cu_seq_k.diff().max()))
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
    pieces = []
    for i in range(len(cu_seq_q) - 1):
        q = query[cu_seq_q[i] : cu_seq_q[i + 1]]
        k, v = (x[cu_seq_k[i] : cu_seq_k[i + 1]] for x in (key, value))
        seen = torch.arange(len(k))[None] <= torch.arange(len(q))[:, None] + len(k) - len(q)
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        pieces.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(pieces)


def pretend(patch: pytest.MonkeyPatch | Any) -> None:
    """Make attention take the flash path, with the stand-in instead of CUDA's kernel."""
    patch.setattr(attention, "has_flash_kernel", lambda _: True)
    patch.setattr(attention, "varlen_attn", varlen_attn)
