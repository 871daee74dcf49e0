"""A training step by plain transformers on the rollouts of train_1p5b_8k: once in padded batches, once unpadded.

The weights are bf16, with fused AdamW on them. SDPA runs with and without cuDNN's attention; the faster time counts.
Logits exist for response tokens only. If memory does not suffice, activations are recomputed, as a user would choose.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from setting import (
    DEVICE,
    TEMPERATURE,
    Setting,
    build_hf_config,
    make_random_rollouts,
    measure_seconds,
    peak_gb,
    reset_peak,
)
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from train_shapes import compute_rates

from nemo_disco.data.rollouts import Rollouts

_WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
ATTENTION = {"cudnn": [SDPBackend.CUDNN_ATTENTION, *_WITHOUT_CUDNN], "flash": _WITHOUT_CUDNN}
LOGITS_AT_ONCE = 2048  # positions, where the logits of all do not fit into memory


def padded(setting: Setting) -> dict[str, Any]:
    """Time and memory of a step with two sequences in a batch, in sampling order, padded to the longer one."""
    return _measure(setting, 2)


def unpadded(setting: Setting) -> dict[str, Any]:
    """Time and memory of a step with one sequence at a time: no padding, and at these lengths each fills the device."""
    return _measure(setting, 1)


def _measure(setting: Setting, rows: int) -> dict[str, Any]:
    """Speed, memory and recomputation of a step with `rows` sequences in a batch."""
    from transformers import AutoModelForCausalLM

    shape = setting.shape("1p5b")
    rollouts = make_random_rollouts(shape.vocab, setting.rollout_sizes("1p5b"))
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(
            build_hf_config(shape), dtype=torch.bfloat16, attn_implementation="sdpa"
        ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0, fused=DEVICE.type == "cuda")
    batches = _make_batches(rollouts, rows)
    chunk: int | None = None

    def step() -> None:
        optimizer.zero_grad()
        for batch in batches:
            (1e-6 * _log_probs(model, *batch, chunk)).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    reset_peak()
    if not _fits(step):
        model.gradient_checkpointing_enable()
        if not _fits(step):
            chunk = LOGITS_AT_ONCE
    optimizer.zero_grad()
    reset_peak()
    by_attention = {}
    for name, backends in ATTENTION.items():
        with sdpa_kernel(backends, set_priority=True):
            by_attention[name] = measure_seconds(step, repeats=setting.size(2, 1), warm_up=1)
    checkpointing = bool(model.is_gradient_checkpointing)
    return {
        **compute_rates(setting, shape, rollouts, min(by_attention.values())),
        "seconds_by_attention": by_attention,
        "peak_gb": peak_gb(),
        "rows_a_batch": rows,
        "gradient_checkpointing": checkpointing,
        "logits_at_once": chunk,
    }


def _fits(step: Callable[[], None]) -> bool:
    """Run a step; True if the device's memory sufficed."""
    try:
        step()
    except torch.OutOfMemoryError:
        return False  # the step's tensors are freed with its frame
    return True


def _make_batches(rollouts: Rollouts, rows: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Batches of token ids [rows, S] with two masks [rows, S]: real tokens, and positions that predict response tokens.

    rows: sequences in a batch, fewer in the last.
    """
    batches = []
    for first in range(0, len(rollouts), rows):
        indices = list(range(first, min(first + rows, len(rollouts))))
        sequences = [torch.cat([rollouts.prompt(i), rollouts.response(i)]) for i in indices]
        ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
        position = torch.arange(ids.shape[1])[None]
        lengths = rollouts.total_lengths[indices][:, None]
        predicts = (position >= rollouts.prompt_lengths[indices][:, None] - 1) & (position < lengths - 1)
        batches.append((ids.to(DEVICE), (position < lengths).to(DEVICE), predicts.to(DEVICE)))
    return batches


def _log_probs(model: Callable[..., Any], ids: Tensor, real: Tensor, predicts: Tensor, chunk: int | None) -> Tensor:
    """Log-probs [T] of the response tokens of a batch.

    chunk: at how many positions logits are in memory at a time, for which backward computes them again; None: at all.
    """
    mask = None if bool(real.all()) else real
    states = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state  # type: ignore[attr-defined]
    states, targets = states[predicts], ids.roll(-1, 1)[predicts]

    def head(states: Tensor, targets: Tensor) -> Tensor:
        logits = model.lm_head(states).float() / TEMPERATURE  # type: ignore[attr-defined]
        return -torch.nn.functional.cross_entropy(logits, targets, reduction="none")

    if chunk is None:
        return head(states, targets)
    parts = zip(states.split(chunk), targets.split(chunk), strict=True)
    return torch.cat([checkpoint(head, *part, use_reentrant=False) for part in parts])
