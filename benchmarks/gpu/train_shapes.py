"""The training step at a published shape, random weights, responses up to 8k, packed: MFU, tokens a second, memory."""

from __future__ import annotations

from typing import Any

import torch
from setting import DEVICE, Setting, build_policy, made_up_rollouts, model_directory, peak_gb, reset_peak, seconds

from nemo_disco.data.rollouts import Rollouts
from nemo_disco.estimate.flops import TRAINING, forward_flops, peak_flops
from nemo_disco.models.shape import ModelShape
from nemo_disco.policy import attention


def train_1p5b_8k(setting: Setting) -> dict[str, Any]:
    """Forward, backward and optimizer; the layers that this machine takes by itself."""
    return _step(setting, "1p5b", budget=setting.size(16896, 200))


def train_1p5b_8k_long(setting: Setting) -> dict[str, Any]:
    """The same by local layers, with sequences of 2048 tokens or more one by one through SDPA, which has cuDNN."""
    attention.LONG_FROM = setting.size(2048, 20)
    return _step(setting, "1p5b", budget=setting.size(16896, 200), transformer_engine=False)


def train_1p5b_8k_local(setting: Setting) -> dict[str, Any]:
    """The same with the local layers, where Transformer Engine is taken by itself."""
    return _step(setting, "1p5b", budget=setting.size(16896, 200), transformer_engine=False)


def train_7b_8k(setting: Setting) -> dict[str, Any]:
    """Without an optimizer, whose 91 GB do not fit beside 46 GB of weights and gradients on one GPU. Where less than
    100 GB are there, activations are computed again: they would take some 40 GB."""
    return _step(setting, "7b", budget=setting.size(8704, 200), with_optimizer=False, **_recomputing(100))


def train_qwen3_0p6b_16k(setting: Setting) -> dict[str, Any]:
    """Two sequences of 16,384 tokens, one a micro-batch: a shape that is published for one H100."""
    return _step(setting, "qwen3_0p6b_16k", budget=setting.size(16384, 64))


def train_qwen3_0p6b_65k(setting: Setting) -> dict[str, Any]:
    """One sequence of 65,536 tokens. Its activations would take some 80 GB."""
    return _step(setting, "qwen3_0p6b_65k", budget=setting.size(65536, 128), **_recomputing(130))


def _recomputing(below_gb: float) -> dict[str, str]:
    """Keys of the section `model`: compute activations again where the device has less memory than that."""
    roomy = DEVICE.type == "cuda" and torch.cuda.get_device_properties(DEVICE).total_memory / 1e9 >= below_gb
    return {} if roomy else {"activations_checkpoint_granularity": "full"}


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


def _step(setting: Setting, name: str, budget: int, with_optimizer: bool = True, **changes: Any) -> dict[str, Any]:
    shape = setting.shape(name)
    rollouts = made_up_rollouts(shape.vocab, setting.rollout_sizes(name))
    weights = torch.full((int(rollouts.response_lengths.sum()),), 1e-6, device=DEVICE)
    with model_directory(shape) as path:
        policy = build_policy(path, budget, with_optimizer=with_optimizer, **changes)

    def step() -> None:
        policy.accumulate(rollouts, lambda index, log_probs, _: weights[index] * log_probs)
        if with_optimizer:
            assert policy.step().applied

    reset_peak()
    time_s = seconds(step, repeats=setting.size(3, 1), warm_up=2)
    forward_s = seconds(lambda: policy.log_probs(rollouts), repeats=1)
    return {
        **rates(setting, shape, rollouts, time_s),
        "forward_seconds": forward_s,
        "peak_gb": peak_gb(),
        "transformer_engine": policy.transformer_engine,
        "optimizer_step": with_optimizer,
        "recomputed": bool(changes.get("activations_checkpoint_granularity")),
        "responses": len(rollouts),
    }
