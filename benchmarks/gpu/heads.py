"""Log-probs and entropy from hidden states at a large vocabulary: time against the roofline, memory, and error."""

from __future__ import annotations

from typing import Any

import torch
from setting import CUDA, DEVICE, TEMPERATURE, Setting, peak_gb, relative_error, reset_peak, seconds

from nemo_disco.policy import log_probs
from nemo_disco.policy.log_probs import token_log_probs


def run(setting: Setting) -> dict[str, Any]:
    """Both ways of token_log_probs (Triton's kernels, tiles of logits), forward and backward, with entropy."""
    n, v, h = setting.size(32768, 96), setting.size(151936, 300), setting.size(1536, 32)
    hidden = torch.randn(n, h, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(v, h, device=DEVICE).mul_(3 / h**0.5).bfloat16().requires_grad_()
    targets = torch.randint(v, (n,), device=DEVICE)
    results: dict[str, Any] = {"tokens": n, "vocabulary": v, "hidden": h, **_floor(setting, n, v, h)}
    for name, usable in (("kernel", CUDA), ("tiled", True)):
        if usable:
            results[name] = _measure(setting, name, hidden, weight, targets)
            if (floor := results["roofline_s"]) is not None:
                results[name]["times_the_roofline"] = results[name]["forward_backward_s"] / floor
    return results


def _floor(setting: Setting, n: int, v: int, h: int) -> dict[str, Any]:
    """Three passes of matrix products that cannot be left out, or the fewest bytes: the larger of the two times.
    Recomputing the logits in backward is a choice, so it is not in the floor."""
    flops, moved = 3 * 2 * n * v * h, 2 * (3 * n * h + 3 * v * h)
    rate, bandwidth = setting.floor("matrix_flops"), setting.floor("copy_bytes_per_second")
    known = rate is not None and bandwidth is not None
    floor = max(flops / rate, moved / bandwidth) if known and rate and bandwidth else None
    return {"flops": flops, "fewest_bytes": moved, "roofline_s": floor}


def _measure(
    setting: Setting, name: str, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
) -> dict[str, Any]:
    chosen = log_probs._kernel
    log_probs._kernel = chosen if name == "kernel" else lambda *_: None  # type: ignore[assignment]
    try:
        return _time_and_error(setting, hidden, weight, targets)
    finally:
        log_probs._kernel = chosen


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
