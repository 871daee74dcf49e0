"""Speed of a step's training part per device: tokens and model FLOPs a second, and the share of the datasheet's FLOPs.

Counts the FLOPs that the lengths of the responses need, whatever a layout or recomputation adds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from nemo_disco.data.rollouts import Rollouts
from nemo_disco.estimate.flops import TRAINING, forward_flops
from nemo_disco.models.shape import ModelShape


@dataclass(eq=False)
class Throughput:
    """Adds up the mini-batches of a step that went through a forward and a backward pass.

    peak_flops: of one device; None (a CPU, an unknown GPU) leaves MFU out.
    """

    shape: ModelShape
    devices: int
    peak_flops: float | None
    tokens: int = 0
    flops: int = 0

    def add(self, rollouts: Rollouts) -> None:
        """Count a mini-batch. A response's last token predicts nothing and is not read; an empty one is not run."""
        lengths = (rollouts.total_lengths - 1)[rollouts.response_lengths > 0].tolist()
        self.tokens += sum(lengths)
        self.flops += TRAINING * forward_flops(self.shape, lengths, int(rollouts.response_lengths.sum()))

    def metrics(self, train_s: float, training_part_s: float) -> dict[str, float]:
        """Metrics of the mini-batches since the last call; NaN if there were none.

        train_s: seconds of forward, backward and optimizer; training_part_s: with the log-probs before them.
        """
        rate = self.flops / train_s / self.devices if self.tokens else math.nan
        metrics = {
            "throughput/tokens_per_second": self.tokens / training_part_s / self.devices if self.tokens else math.nan,
            "throughput/tflops": rate / 1e12,
        }
        self.tokens = self.flops = 0
        return metrics if self.peak_flops is None else metrics | {"throughput/mfu": rate / self.peak_flops}
