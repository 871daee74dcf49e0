"""The training step at a published shape, random weights, responses up to 8k, packed: MFU, tokens a second, memory."""

from __future__ import annotations

from typing import Any

import torch
from setting import DEVICE, Setting, build_policy, made_up_rollouts, model_directory, peak_gb, reset_peak, seconds

from nemo_disco.config.flops import TRAINING, forward_flops, peak_flops
from nemo_disco.config.shape import ModelShape
from nemo_disco.data.rollouts import Rollouts


def train_1p5b_8k(setting: Setting) -> dict[str, Any]:
    """Forward, backward and optimizer; the layers that this machine takes by itself."""
    return _step(setting, "1p5b", questions=setting.size(4, 2), budget=setting.size(16896, 200))


def train_1p5b_8k_local(setting: Setting) -> dict[str, Any]:
    """The same with the local layers, where Transformer Engine is taken by itself."""
    return _step(
        setting, "1p5b", questions=setting.size(4, 2), budget=setting.size(16896, 200), transformer_engine=False
    )


def train_7b_8k(setting: Setting) -> dict[str, Any]:
    """Without the optimizer's step: its moments do not fit beside the gradients on one GPU."""
    return _step(setting, "7b", questions=setting.size(1, 2), budget=setting.size(8704, 200), optimizer=False)


def training_flops(shape: ModelShape, rollouts: Rollouts) -> int:
    lengths = (rollouts.total_lengths - 1).tolist()
    return TRAINING * forward_flops(shape, lengths, int(rollouts.response_lengths.sum()))


def rates(setting: Setting, shape: ModelShape, rollouts: Rollouts, time_s: float) -> dict[str, Any]:
    """mfu: model FLOPs, recomputation not counted, over the datasheet's; mfu_of_measured: over the matrix rate that
    this run measured."""
    flops = training_flops(shape, rollouts)
    datasheet = peak_flops(torch.cuda.get_device_name()) if DEVICE.type == "cuda" else None
    measured = setting.floor("matrix_flops")
    return {
        "seconds": time_s,
        "tokens": int((rollouts.total_lengths - 1).sum()),
        "tokens_per_second": int((rollouts.total_lengths - 1).sum()) / time_s,
        "tflops": flops / time_s / 1e12,
        "mfu": None if datasheet is None else flops / time_s / datasheet,
        "mfu_of_measured": None if measured is None else flops / time_s / measured,
    }


def rollouts_8k(setting: Setting, shape: ModelShape, questions: int) -> Rollouts:
    """The rollouts of the 1.5B and 7B rows and of their baselines: prompts of 256 tokens, responses up to 8192."""
    limit, prompt = setting.size(8192, 48), setting.size(256, 8)
    return made_up_rollouts(shape.vocab, questions, setting.size(8, 4), limit, prompt)


def _step(
    setting: Setting, name: str, questions: int, budget: int, optimizer: bool = True, **changes: Any
) -> dict[str, Any]:
    shape = setting.shape(name)
    rollouts = rollouts_8k(setting, shape, questions)
    weights = torch.full((int(rollouts.response_lengths.sum()),), 1e-6, device=DEVICE)
    with model_directory(shape) as path:
        policy = build_policy(path, budget, **changes)

    def step() -> None:
        policy.accumulate(rollouts, lambda index, log_probs, _: weights[index] * log_probs)
        if optimizer:
            assert policy.step().applied

    reset_peak()
    time_s = seconds(step, repeats=setting.size(3, 1), warm_up=2)
    forward_s = seconds(lambda: policy.log_probs(rollouts), repeats=1)
    return {
        **rates(setting, shape, rollouts, time_s),
        "forward_seconds": forward_s,
        "peak_gb": peak_gb(),
        "transformer_engine": policy.transformer_engine,
        "optimizer_step": optimizer,
        "responses": len(rollouts),
    }
