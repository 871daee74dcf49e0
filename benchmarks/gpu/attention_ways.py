"""Attention at the 1.5B shape on one micro-batch of long sequences, forward and backward, each way that there is:
packed (torch's varlen kernel) and one by one (SDPA with cuDNN's kernel), with its error against float32.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import torch
from setting import DEVICE, Setting, changed, relative_error, seconds
from torch import Tensor

from nemo_disco.models.shape import ModelShape
from nemo_disco.policy import attention
from nemo_disco.policy.attention import PackedCausalAttention, PackedSequences, has_flash_kernel


def ways() -> dict[str, AbstractContextManager[None]]:
    """The settings of each way; each may be entered once."""
    return {"packed": changed(attention, LONG_FROM=None), "alone": changed(attention, LONG_FROM=1)}


def run(setting: Setting) -> dict[str, Any]:
    """Without a flash kernel (on a CPU) `packed` is SDPA by buckets."""
    lengths = setting.attention_lengths()
    core, packed, qkv, grad = inputs(setting.shape("1p5b"), lengths)
    expected = reference(qkv, grad, slice(0, lengths[0]), torch.float32)
    results: dict[str, Any] = {"lengths": lengths}
    for name, way in ways().items():
        try:
            with way:
                results[name] = _measure(setting, core, packed, qkv, grad, expected)
        except Exception as error:  # one way that fails is a result, and stops no other
            results[name] = {"error": f"{type(error).__name__}: {error}"[:1000]}
    return results | {"flash_kernel": has_flash_kernel(qkv[0])}


def inputs(shape: ModelShape, lengths: list[int]) -> tuple[Any, PackedSequences, list[Tensor], Tensor]:
    """The attention, its sequences, random q, k, v, and a gradient of its output, in bfloat16."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    heads = (shape.heads, shape.kv_heads, shape.kv_heads)
    qkv = [
        torch.randn(sum(lengths), 1, n, shape.head_dim, generator=generator, device=DEVICE).bfloat16().requires_grad_()
        for n in heads
    ]
    grad = torch.randn(sum(lengths), 1, shape.query_width, generator=generator, device=DEVICE).bfloat16()
    core = PackedCausalAttention(SimpleNamespace(kv_channels=shape.head_dim), pg_collection=SimpleNamespace(cp=None))
    return core, _on_device(PackedSequences.from_lengths(lengths)), qkv, grad


def _measure(
    setting: Setting, core: Any, packed: PackedSequences, qkv: list[Tensor], grad: Tensor, expected: list[Tensor]
) -> dict[str, float]:
    out = torch.zeros(())

    def forward_backward() -> None:
        nonlocal out
        for x in qkv:
            x.grad = None
        out = core(*qkv, packed_seq_params=packed)
        out.backward(grad)

    time_s = seconds(forward_backward, setting.size(5, 1), warm_up=2)
    first = len(expected[0])
    found = [out[:first, 0], *(x.grad[:first, 0].flatten(1) for x in qkv if x.grad is not None)]
    errors = [relative_error(f, e) for f, e in zip(found, expected, strict=True)]
    return {"forward_backward_s": time_s, "error_against_float32": errors[0], "gradient_error": max(errors[1:])}


def reference(qkv: list[Tensor], grad: Tensor, rows: slice, dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients of one sequence, which lies in these rows, by the formula in that dtype."""
    q, k, v = (x.detach()[rows, 0].to(dtype).requires_grad_() for x in qkv)
    length = len(q)
    group = q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(group, dim=1).transpose(0, 1) for x in (k, v))
    scores = q.transpose(0, 1) @ keys.transpose(1, 2) / math.sqrt(q.shape[2])
    hidden = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    out = (scores.masked_fill(hidden, float("-inf")).softmax(-1) @ values).transpose(0, 1).flatten(1)
    out.backward(grad[rows, 0].to(dtype))
    return [out.detach(), *(x.grad.flatten(1) for x in (q, k, v) if x.grad is not None)]


def _on_device(packed: PackedSequences) -> PackedSequences:
    from nemo_disco.policy.micro_batch import _send

    return packed if DEVICE.type == "cpu" else _send(packed, DEVICE)
