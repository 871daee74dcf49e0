"""Plain transformers on the same rollouts: one that pads its batches, one that runs sequence by sequence unpadded.

bf16 weights, SDPA (its flash kernel), fused AdamW on the bf16 weights, logits materialised for the responses alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from setting import DEVICE, TEMPERATURE, Setting, hf_config, peak_gb, reset_peak, seconds
from torch import Tensor
from train_shapes import rates, rollouts_8k

from nemo_disco.data.rollouts import Rollouts


def padded(setting: Setting) -> dict[str, Any]:
    """Two a batch, in the order in which they were sampled, each padded to the longer one."""
    return _measure(setting, 2)


def unpadded(setting: Setting) -> dict[str, Any]:
    """One sequence at a time: nothing is padded, and at these lengths each fills the device."""
    return _measure(setting, 1)


def _measure(setting: Setting, rows: int) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    shape = setting.shape("1p5b")
    rollouts = rollouts_8k(setting, shape, setting.size(4, 2))
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(
            hf_config(shape), dtype=torch.bfloat16, attn_implementation="sdpa"
        ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0, fused=DEVICE.type == "cuda")
    batches = _batches(rollouts, rows)

    def step() -> None:
        optimizer.zero_grad()
        for batch in batches:
            (1e-6 * _log_probs(model, *batch)).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    reset_peak()
    checkpointing = False
    try:
        step()
    except torch.OutOfMemoryError:  # then it recomputes, as one would
        model.gradient_checkpointing_enable()
        optimizer.zero_grad()
        reset_peak()
        checkpointing = True
    time_s = seconds(step, repeats=setting.size(2, 1), warm_up=1)
    run = rates(setting, shape, rollouts, time_s)
    return {**run, "peak_gb": peak_gb(), "rows_a_batch": rows, "gradient_checkpointing": checkpointing}


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


def _log_probs(model: Callable[..., Any], ids: Tensor, real: Tensor, predicts: Tensor) -> Tensor:
    mask = None if bool(real.all()) else real
    states = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state  # type: ignore[attr-defined]
    logits = model.lm_head(states[predicts]).float() / TEMPERATURE  # type: ignore[attr-defined]
    targets = ids.roll(-1, 1)[predicts]
    return -torch.nn.functional.cross_entropy(logits, targets, reduction="none")
