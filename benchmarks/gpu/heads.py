"""Time, memory and error of log-probs and entropies from hidden states at a large vocabulary, by each variant, and of
the KL over the old policy's likely tokens (constraint.estimator=top_k)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from setting import (
    CUDA,
    DEVICE,
    TEMPERATURE,
    Setting,
    measure_seconds,
    override_attributes,
    peak_gb,
    relative_error,
    reset_peak,
)

from nemo_disco.algorithms.objectives import Constraint
from nemo_disco.policy import log_probs
from nemo_disco.policy.likely_tokens import LikelyTokens, find_likely_tokens, token_divergences
from nemo_disco.policy.log_probs import token_log_probs

LIKELY = Constraint().top_k  # tokens that the constraint's estimator top_k compares by default


def run(setting: Setting) -> dict[str, Any]:
    """Times, memory and errors of each variant of token_log_probs by its name, or the error that it raised."""
    n, v, h = setting.head_sizes()
    hidden = torch.randn(n, h, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(v, h, device=DEVICE).mul_(3 / h**0.5).bfloat16().requires_grad_()
    targets = torch.randint(v, (n,), device=DEVICE)
    results: dict[str, Any] = {"tokens": n, "vocabulary": v, "hidden": h}
    for name, variant in make_variants().items():
        results[name] = _result_or_error(variant, _measure, setting, hidden, weight, targets)
    likely = _result_or_error(nullcontext(), _measure_likely_tokens, setting, hidden, weight, targets)
    return results | {"likely_tokens": likely}


def _result_or_error(
    variant: AbstractContextManager[None], measure: Callable[..., dict[str, Any]], *arguments: Any
) -> dict[str, Any]:
    """The result of a measurement in a variant's context. A failure is its result too, so that the others still run."""
    try:
        with variant:
            return measure(*arguments)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:1000]}


def _measure_likely_tokens(
    setting: Setting, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
) -> dict[str, Any]:
    """Seconds to find the likely tokens, and of log-prob and KL forward and backward; the KL's error against float32.

    The old policy is the same weights with other hidden states.
    """
    repeats, vocabulary = setting.size(5, 1), len(weight)

    def find() -> torch.Tensor:
        return find_likely_tokens(hidden.detach(), weight.detach(), LIKELY, vocab_size=vocabulary)

    ids = torch.cat([targets[:, None], find()], 1)
    with torch.no_grad():
        moved = hidden + 0.3 * torch.randn_like(hidden)
        old_log_probs, _ = token_log_probs(moved, weight, ids[:, 1:], temperature=TEMPERATURE)
    old = LikelyTokens(ids[:, 1:].int(), old_log_probs, complete=False)

    def forward() -> tuple[torch.Tensor, torch.Tensor]:
        log_probs, _ = token_log_probs(hidden, weight, ids, temperature=TEMPERATURE)
        return log_probs[:, 0], token_divergences(log_probs[:, 1:], old)

    def forward_backward() -> None:
        hidden.grad = weight.grad = None
        sum(values.sum() for values in forward()).backward()  # type: ignore[union-attr]

    rows = slice(0, setting.size(512, 32))
    with torch.no_grad():
        exact = [
            (states[rows].float() @ weight.float().T / TEMPERATURE).log_softmax(-1).gather(1, ids[rows, 1:])
            for states in (hidden, moved)
        ]
        expected = token_divergences(exact[0], LikelyTokens(ids[rows, 1:].int(), exact[1], complete=False))
        error = relative_error(forward()[1][rows], expected)
    return {
        "tokens_compared": LIKELY,
        "find_s": measure_seconds(find, repeats),
        "forward_backward_s": measure_seconds(forward_backward, repeats),
        "kl_error_against_float32": error,
    }


def make_variants() -> dict[str, AbstractContextManager[None]]:
    """For each variant, the default first, a context in which log-probs are computed by it. It can be entered once.

    Without CUDA there are only tiles of logits (`tiled`); with CUDA also the Triton kernels, at their defaults
    (`kernel`) and with one setting changed at a time.
    """
    tiled = {"tiled": override_attributes(log_probs, _kernel=lambda *_: None)}
    if not CUDA:
        return tiled
    from nemo_disco.policy import log_probs_kernel as kernel

    other_order = override_attributes(kernel, SPLITS_FIRST=not kernel.SPLITS_FIRST)
    return {
        "kernel": nullcontext(),
        "tokens_first" if kernel.SPLITS_FIRST else "splits_first": other_order,
        "wide_backward": override_attributes(kernel, BACKWARD=kernel.WIDE_BACKWARD),
        "fused_sum": override_attributes(log_probs, FUSED_SUM=True),
        **tiled,
    }


def _measure(setting: Setting, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> dict[str, Any]:
    """Seconds, memory in GB beyond the inputs and their gradients, and errors at the first rows against float32."""

    def forward() -> tuple[torch.Tensor, torch.Tensor | None]:
        return token_log_probs(hidden, weight, targets, temperature=TEMPERATURE, entropies=True)

    def forward_backward() -> None:
        hidden.grad = weight.grad = None
        values, entropies = forward()
        assert entropies is not None
        (values + entropies).sum().backward()

    forward_backward()
    reset_peak()
    allocated_gb = torch.cuda.memory_allocated() / 1e9 if CUDA else 0.0  # with the gradients of hidden and weight
    forward_backward()
    peak = peak_gb()
    with torch.no_grad():
        forward_s = measure_seconds(forward, setting.size(5, 1))
    rows = slice(0, setting.size(512, 32))
    states = hidden[rows].detach().float().requires_grad_()
    log_p = (states @ weight.detach().float().T / TEMPERATURE).log_softmax(-1)
    expected, expected_entropies = log_p.gather(1, targets[rows, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    (expected + expected_entropies).sum().backward()
    forward_backward()
    assert hidden.grad is not None and states.grad is not None
    gradient_error = relative_error(hidden.grad[rows], states.grad)
    with torch.no_grad():
        values, entropies = forward()
    assert entropies is not None
    return {
        "forward_s": forward_s,
        "forward_backward_s": measure_seconds(forward_backward, setting.size(5, 1)),
        "extra_peak_gb": None if peak is None else peak - allocated_gb,
        "error_against_float32": relative_error(values[rows], expected),
        "entropy_error_against_float32": relative_error(entropies[rows], expected_entropies),
        "gradient_error_against_float32": gradient_error,
    }
