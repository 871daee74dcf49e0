"""Throughput: tokens and model FLOPs per second and device during the training part of a step."""

from __future__ import annotations

import pytest
from tiny_models import random_rollouts

from nemo_disco.algorithms.throughput import Throughput
from nemo_disco.estimate.flops import forward_flops
from nemo_disco.models.architecture import ARCHITECTURES
from nemo_disco.models.shape import ModelShape

SHAPE = ModelShape(4, 64, 128, 8, 4, 8, 130, tied=True, architecture=ARCHITECTURES["qwen2"], max_positions=256)


def test_rates_are_per_device_and_of_the_tokens_that_were_read() -> None:
    rollouts = random_rollouts(longest=3)
    assert 0 in rollouts.response_lengths, "the rollouts must have an empty response, which the policy does not read"
    lengths = [int(rollouts.total_lengths[i]) - 1 for i in range(len(rollouts)) if rollouts.response_lengths[i]]
    throughput = Throughput(SHAPE, devices=2, peak_flops=1e9)
    for _ in range(3):
        throughput.add(rollouts)
    metrics = throughput.metrics(train_s=2.0, training_part_s=4.0)
    flops = 3 * 3 * forward_flops(SHAPE, lengths, int(rollouts.response_lengths.sum()))
    assert metrics["throughput/tokens_per_second"] == pytest.approx(3 * sum(lengths) / 4 / 2)
    assert metrics["throughput/tflops"] == pytest.approx(flops / 2 / 2 / 1e12)
    assert metrics["throughput/mfu"] == pytest.approx(flops / 2 / 2 / 1e9)


def test_no_mfu_for_a_device_without_a_datasheet() -> None:
    throughput = Throughput(SHAPE, devices=1, peak_flops=None)
    throughput.add(random_rollouts())
    assert "throughput/mfu" not in throughput.metrics(1.0, 1.0)
