"""Save and load the training state of a run: weights, optimizer, schedule, RNG and the trainer's own state.

The format is megatron-core's torch_dist beside a plain checkpoint.json. A checkpoint loads at any layout, bit for bit
at the one that wrote it. Touches the policy; must not know the training loop.
"""

from nemo_disco.checkpoint.reader import latest, load, load_latest
from nemo_disco.checkpoint.writer import CheckpointWriter, save

__all__ = ["CheckpointWriter", "latest", "load", "load_latest", "save"]
