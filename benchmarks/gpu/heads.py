"""Log-probs and entropy from hidden states at a large vocabulary: time against the roofline, memory, and error."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from setting import CUDA, DEVICE, TEMPERATURE, Setting, changed, peak_gb, relative_error, reset_peak, seconds

from nemo_disco.policy import log_probs
from nemo_disco.policy.log_probs import token_log_probs


def run(setting: Setting) -> dict[str, Any]:
    """The ways of token_log_probs, forward and backward, with entropy: tiles of logits, Triton's kernels as they are by
    default, and with one of their settings changed at a time."""
    n, v, h = setting.head()
    hidden = torch.randn(n, h, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(v, h, device=DEVICE).mul_(3 / h**0.5).bfloat16().requires_grad_()
    targets = torch.randint(v, (n,), device=DEVICE)
    results: dict[str, Any] = {"tokens": n, "vocabulary": v, "hidden": h}
    for name, way in ways().items():
        try:
            with way:
                results[name] = _time_and_error(setting, hidden, weight, targets)
        except Exception as error:  # one way that fails is a result, and stops no other
            results[name] = {"error": f"{type(error).__name__}: {error}"[:1000]}
    return results


def ways() -> dict[str, AbstractContextManager[None]]:
    """The settings of each way, the default first; each may be entered once."""
    tiled = {"tiled": changed(log_probs, _kernel=lambda *_: None)}
    if not CUDA:
        return tiled
    from nemo_disco.policy import log_probs_kernel as kernel

    other_order = changed(kernel, SPLITS_FIRST=not kernel.SPLITS_FIRST)
    return {
        "kernel": nullcontext(),
        "tokens_first" if kernel.SPLITS_FIRST else "splits_first": other_order,
        "wide_backward": changed(kernel, BACKWARD=kernel.WIDE_BACKWARD),
        "fused_sum": changed(log_probs, FUSED_SUM=True),
        **tiled,
    }


def _time_and_error(
    setting: Setting, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
) -> dict[str, Any]:
    def forward() -> tuple[torch.Tensor, torch.Tensor | None]:
        return token_log_probs(hidden, weight, targets, temperature=TEMPERATURE, entropies=True)

    def forward_backward() -> None:
        hidden.grad = weight.grad = None
        values, entropies = forward()
        assert entropies is not None
        (values + entropies).sum().backward()

    forward_backward()
    reset_peak()
    held = torch.cuda.memory_allocated() / 1e9 if CUDA else 0.0  # with the gradients of hidden and weight
    forward_backward()
    peak = peak_gb()
    with torch.no_grad():
        forward_s = seconds(forward, setting.size(5, 1))
    rows = slice(0, setting.size(512, 32))
    states = hidden[rows].detach().float().requires_grad_()
    log_p = (states @ weight.detach().float().T / TEMPERATURE).log_softmax(-1)
    expected, expected_entropies = log_p.gather(1, targets[rows, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    (expected + expected_entropies).sum().backward()
    forward_backward()
    assert hidden.grad is not None and states.grad is not None
    gradient_error = relative_error(hidden.grad[rows], states.grad)
    with torch.no_grad():
        found, entropies = forward()
    assert entropies is not None
    return {
        "forward_s": forward_s,
        "forward_backward_s": seconds(forward_backward, setting.size(5, 1)),
        "extra_peak_gb": None if peak is None else peak - held,
        "error_against_float32": relative_error(found[rows], expected),
        "entropy_error_against_float32": relative_error(entropies[rows], expected_entropies),
        "gradient_error_against_float32": gradient_error,
    }
