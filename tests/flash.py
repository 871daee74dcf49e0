"""A stand-in in plain torch for torch's flash attention kernel of ragged sequences, for machines without the kernel."""

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
    """Causal attention [T_q, H, D] within each sequence, with its last query aligned to its last key, to as many tokens
    before a query's own as window_size[0] says; -1: to all.

    cu_seq_q, cu_seq_k: where the sequences begin and end among the T_q queries and the T_k keys.
    """
    before, after = window_size
    assert after == 0 and enable_gqa
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert (max_q, max_k) == (int(cu_seq_q.diff().max()), int(cu_seq_k.diff().max()))
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
    outputs = []
    for i in range(len(cu_seq_q) - 1):
        q = query[cu_seq_q[i] : cu_seq_q[i + 1]]
        k, v = (x[cu_seq_k[i] : cu_seq_k[i + 1]] for x in (key, value))
        distance = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))[None]
        visible = (distance >= 0) & (distance <= (before if before >= 0 else len(k)))
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(outputs)


def install_stand_in(patch: pytest.MonkeyPatch | Any) -> None:
    """Make the package's attention use the stand-in as if it were CUDA's flash kernel."""
    patch.setattr(attention, "has_flash_kernel", lambda _: True)
    patch.setattr(attention, "varlen_attn", varlen_attn)
