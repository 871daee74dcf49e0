"""Time and error of attention on one micro-batch of long sequences at the 1.5B shape, forward and backward.

There are two variants: `packed` (torch's varlen kernel for the whole micro-batch) and `alone` (SDPA with cuDNN's kernel
for one sequence at a time). The errors are against float32.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import torch
from setting import DEVICE, Setting, measure_seconds, override_attributes, relative_error
from torch import Tensor

from nemo_disco.models.shape import ModelShape
from nemo_disco.policy import attention
from nemo_disco.policy.attention import PackedCausalAttention, PackedSequences, has_flash_kernel


def make_variants() -> dict[str, AbstractContextManager[None]]:
    """For each variant, the default first, a context in which it computes attention. A context can be entered once."""
    return {
        "packed": override_attributes(attention, LONG_FROM=None),
        "alone": override_attributes(attention, LONG_FROM=1),
    }


def run(setting: Setting) -> dict[str, Any]:
    """Seconds and errors of each variant by its name, or the error that it raised.

    Without a flash kernel (on a CPU) both variants are SDPA by buckets.
    """
    lengths = setting.attention_lengths()
    core, packed, qkv, grad = make_inputs(setting.shape("1p5b"), lengths)
    expected = compute_reference(qkv, grad, slice(0, lengths[0]), torch.float32)
    results: dict[str, Any] = {"lengths": lengths}
    for name, variant in make_variants().items():
        try:
            with variant:
                results[name] = _measure(setting, core, packed, qkv, grad, expected)
        except Exception as error:  # a failure is this variant's result; the others still run
            results[name] = {"error": f"{type(error).__name__}: {error}"[:1000]}
    return results | {"flash_kernel": has_flash_kernel(qkv[0])}


def make_inputs(shape: ModelShape, lengths: list[int]) -> tuple[Any, PackedSequences, list[Tensor], Tensor]:
    """The attention module, the packed sequences, random q, k, v, and a random gradient of the output.

    q, k, v [tokens, 1, heads, head_dim] and the gradient [tokens, 1, query width] are in bfloat16.
    """
    generator = torch.Generator(DEVICE).manual_seed(0)
    heads = (shape.heads, shape.kv_heads, shape.kv_heads)
    qkv = [
        torch.randn(sum(lengths), 1, n, shape.head_dim, generator=generator, device=DEVICE).bfloat16().requires_grad_()
        for n in heads
    ]
    grad = torch.randn(sum(lengths), 1, shape.query_width, generator=generator, device=DEVICE).bfloat16()
    config = SimpleNamespace(kv_channels=shape.head_dim, window_size=None, window_attn_skip_freq=None)
    core = PackedCausalAttention(config, layer_number=1, pg_collection=SimpleNamespace(cp=None))
    return core, _on_device(PackedSequences.from_lengths(lengths)), qkv, grad


def _measure(
    setting: Setting, core: Any, packed: PackedSequences, qkv: list[Tensor], grad: Tensor, expected: list[Tensor]
) -> dict[str, float]:
    """Seconds of a forward and backward pass, and errors at the first sequence, whose results are `expected`."""
    out = torch.zeros(())

    def forward_backward() -> None:
        nonlocal out
        for x in qkv:
            x.grad = None
        out = core(*qkv, packed_seq_params=packed)
        out.backward(grad)

    time_s = measure_seconds(forward_backward, setting.size(5, 1), warm_up=2)
    first = len(expected[0])
    actual = [out[:first, 0], *(x.grad[:first, 0].flatten(1) for x in qkv if x.grad is not None)]
    errors = [relative_error(a, e) for a, e in zip(actual, expected, strict=True)]
    return {"forward_backward_s": time_s, "error_against_float32": errors[0], "gradient_error": max(errors[1:])}


def compute_reference(qkv: list[Tensor], grad: Tensor, rows: slice, dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients of q, k, v for the sequence in these rows, by the formula of attention in this dtype.

    Each is [length, heads * head_dim].
    """
    q, k, v = (x.detach()[rows, 0].to(dtype).requires_grad_() for x in qkv)
    length = len(q)
    queries_per_key = q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(queries_per_key, dim=1).transpose(0, 1) for x in (k, v))
    scores = q.transpose(0, 1) @ keys.transpose(1, 2) / math.sqrt(q.shape[2])
    future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    out = (scores.masked_fill(future, float("-inf")).softmax(-1) @ values).transpose(0, 1).flatten(1)
    out.backward(grad[rows, 0].to(dtype))
    return [out.detach(), *(x.grad.flatten(1) for x in (q, k, v) if x.grad is not None)]


def _on_device(packed: PackedSequences) -> PackedSequences:
    from nemo_disco.policy.micro_batch import _send

    return packed if DEVICE.type == "cpu" else _send(packed, DEVICE)
