"""A Trainer with mocks for all of its parts but those that a test provides."""

from typing import Any
from unittest.mock import Mock

from nemo_disco.algorithms.trainer import Trainer
from nemo_disco.config.schema import RunConfig

PARTS = ("policy", "engine", "objective", "collector", "validation", "agreement", "throughput", "warnings", "journal")


def build_bare_trainer(config: RunConfig, **parts: Any) -> Trainer:
    """A Trainer with these parts, by their names in PARTS; the others are mocks under which a step succeeds."""
    mocks: dict[str, Any] = {name: Mock() for name in PARTS}
    mocks["agreement"].check_step.return_value = ""
    mocks["throughput"].metrics.return_value = {}
    return Trainer(config.trainer, config.exp_manager, config.algorithm, **(mocks | parts))
