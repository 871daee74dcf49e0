"""Speed and memory of a gradient step on packed rollouts, at published shapes with random weights."""

from __future__ import annotations

from typing import Any

import torch
from setting import (
    DEVICE,
    Setting,
    build_policy,
    make_random_rollouts,
    measure_seconds,
    model_directory,
    peak_gb,
    reset_peak,
)

from nemo_disco.data.rollouts import Rollouts
from nemo_disco.estimate.flops import TRAINING, forward_flops, peak_flops
from nemo_disco.models.shape import ModelShape
from nemo_disco.policy import attention


def train_1p5b_8k(setting: Setting) -> dict[str, Any]:
    """Forward, backward and optimizer at the 1.5B shape with responses of up to 8192 tokens, by the default layers."""
    return _step(setting, "1p5b", budget=setting.size(16896, 200))


def train_1p5b_8k_long(setting: Setting) -> dict[str, Any]:
    """train_1p5b_8k by the local layers, with SDPA (by cuDNN) for one long sequence at a time, from 2048 tokens on."""
    attention.LONG_FROM = setting.size(2048, 20)
    return _step(setting, "1p5b", budget=setting.size(16896, 200), transformer_engine=False)


def train_1p5b_8k_local(setting: Setting) -> dict[str, Any]:
    """train_1p5b_8k by the local layers, for a machine whose default is Transformer Engine."""
    return _step(setting, "1p5b", budget=setting.size(16896, 200), transformer_engine=False)


def train_7b_8k(setting: Setting) -> dict[str, Any]:
    """Forward and backward at the 7B shape, with activations recomputed on a device of less than 100 GB.

    There is no optimizer: its 91 GB do not fit beside 46 GB of weights and gradients. Activations take about 40 GB.
    """
    return _step(setting, "7b", budget=setting.size(8704, 200), with_optimizer=False, **_recompute_below(100))


def train_qwen3_0p6b_16k(setting: Setting) -> dict[str, Any]:
    """Two sequences of 16,384 tokens, one in each micro-batch: a setup whose speed on one H100 is published."""
    return _step(setting, "qwen3_0p6b_16k", budget=setting.size(16384, 64))


def train_qwen3_0p6b_65k(setting: Setting) -> dict[str, Any]:
    """One sequence of 65,536 tokens, with activations (about 80 GB) recomputed on a device of less than 130 GB."""
    return _step(setting, "qwen3_0p6b_65k", budget=setting.size(65536, 128), **_recompute_below(130))


def _recompute_below(memory_gb: float) -> dict[str, str]:
    """Keys of the setting `model` that recompute activations, if the device has less than `memory_gb`; else none."""
    has_room = DEVICE.type == "cuda" and torch.cuda.get_device_properties(DEVICE).total_memory / 1e9 >= memory_gb
    return {} if has_room else {"activations_checkpoint_granularity": "full"}


def count_training_flops(shape: ModelShape, rollouts: Rollouts) -> int:
    """FLOPs of the model for one forward and backward pass over the rollouts, without recomputation."""
    lengths = (rollouts.total_lengths - 1).tolist()
    return TRAINING * forward_flops(shape, lengths, int(rollouts.response_lengths.sum()))


def compute_rates(setting: Setting, shape: ModelShape, rollouts: Rollouts, time_s: float) -> dict[str, Any]:
    """Tokens and FLOPs per second, and MFU, of a training step that took `time_s` seconds.

    mfu: over the datasheet's rate; mfu_of_measured: over the matrix rate that the section `floors` measured.
    """
    flops = count_training_flops(shape, rollouts)
    datasheet = peak_flops(torch.cuda.get_device_name()) if DEVICE.type == "cuda" else None
    measured = setting.measured_rate("matrix_flops")
    return {
        "seconds": time_s,
        "tokens": int((rollouts.total_lengths - 1).sum()),
        "tokens_per_second": int((rollouts.total_lengths - 1).sum()) / time_s,
        "tflops": flops / time_s / 1e12,
        "mfu": None if datasheet is None else flops / time_s / datasheet,
        "mfu_of_measured": None if measured is None else flops / time_s / measured,
    }


def _step(setting: Setting, name: str, budget: int, with_optimizer: bool = True, **changes: Any) -> dict[str, Any]:
    shape = setting.shape(name)
    rollouts = make_random_rollouts(shape.vocab, setting.rollout_sizes(name))
    weights = torch.full((int(rollouts.response_lengths.sum()),), 1e-6, device=DEVICE)
    with model_directory(shape) as path:
        policy = build_policy(path, budget, with_optimizer=with_optimizer, **changes)

    def step() -> None:
        policy.accumulate(rollouts, lambda index, values: weights[index] * values.log_probs)
        if with_optimizer:
            assert policy.step().applied

    reset_peak()
    time_s = measure_seconds(step, repeats=setting.size(3, 1), warm_up=2)
    forward_s = measure_seconds(lambda: policy.log_probs(rollouts), repeats=1)
    return {
        **compute_rates(setting, shape, rollouts, time_s),
        "forward_seconds": forward_s,
        "peak_gb": peak_gb(),
        "transformer_engine": policy.transformer_engine,
        "optimizer_step": with_optimizer,
        "recomputed": bool(changes.get("activations_checkpoint_granularity")),
        "responses": len(rollouts),
    }
