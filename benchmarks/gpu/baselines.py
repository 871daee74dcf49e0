"""Plain transformers on the same rollouts: one that pads its batches, one that runs sequence by sequence unpadded.

bf16 weights, SDPA with cuDNN's attention and without, of which the faster one counts, fused AdamW on the bf16 weights,
logits materialised for the responses alone. Where memory does not suffice it recomputes, as one would.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from setting import DEVICE, TEMPERATURE, Setting, hf_config, made_up_rollouts, peak_gb, reset_peak, seconds
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from train_shapes import rates

from nemo_disco.data.rollouts import Rollouts

_WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
ATTENTION = {"cudnn": [SDPBackend.CUDNN_ATTENTION, *_WITHOUT_CUDNN], "flash": _WITHOUT_CUDNN}
LOGITS_AT_ONCE = 2048


def padded(setting: Setting) -> dict[str, Any]:
    """Two a batch, in the order in which they were sampled, each padded to the longer one."""
    return _measure(setting, 2)


def unpadded(setting: Setting) -> dict[str, Any]:
    """One sequence at a time: nothing is padded, and at these lengths each fills the device."""
    return _measure(setting, 1)


def _measure(setting: Setting, rows: int) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    shape = setting.shape("1p5b")
    rollouts = made_up_rollouts(shape.vocab, setting.rollout_sizes("1p5b"))
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(
            hf_config(shape), dtype=torch.bfloat16, attn_implementation="sdpa"
        ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0, fused=DEVICE.type == "cuda")
    batches = _batches(rollouts, rows)
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
            by_attention[name] = seconds(step, repeats=setting.size(2, 1), warm_up=1)
    run = rates(setting, shape, rollouts, min(by_attention.values()))
    checkpointing = bool(model.is_gradient_checkpointing)
    return {
        **run,
        "seconds_by_attention": by_attention,
        "peak_gb": peak_gb(),
        "rows_a_batch": rows,
        "gradient_checkpointing": checkpointing,
        "logits_at_once": chunk,
    }


def _fits(step: Callable[[], None]) -> bool:
    try:
        step()
    except torch.OutOfMemoryError:
        return False  # what the step held is gone with its frame
    return True


def _batches(rollouts: Rollouts, rows: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """ids [rows, S], and which positions [rows, S] are real and which predict a response token."""
    found = []
    for first in range(0, len(rollouts), rows):
        picked = list(range(first, min(first + rows, len(rollouts))))
        sequences = [torch.cat([rollouts.prompt(i), rollouts.response(i)]) for i in picked]
        ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
        position = torch.arange(ids.shape[1])[None]
        lengths = rollouts.total_lengths[picked][:, None]
        predicts = (position >= rollouts.prompt_lengths[picked][:, None] - 1) & (position < lengths - 1)
        found.append((ids.to(DEVICE), (position < lengths).to(DEVICE), predicts.to(DEVICE)))
    return found


def _log_probs(model: Callable[..., Any], ids: Tensor, real: Tensor, predicts: Tensor, chunk: int | None) -> Tensor:
    """chunk: of how many positions the logits may be in memory at once (computed again in backward); None: all."""
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
