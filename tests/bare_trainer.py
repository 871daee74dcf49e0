"""A Trainer of which a test gives the parts that it looks at; the others are mocks."""

from typing import Any
from unittest.mock import Mock

from nemo_disco.algorithms.trainer import Trainer
from nemo_disco.config.schema import RunConfig

PARTS = ("policy", "engine", "objective", "collector", "validation", "agreement", "throughput", "warnings", "journal")


def bare_trainer(config: RunConfig, **parts: Any) -> Trainer:
    mocks: dict[str, Any] = {name: Mock() for name in PARTS}
    mocks["collector"].generation.asynchronous = False
    mocks["agreement"].check_step.return_value = ""
    mocks["throughput"].metrics.return_value = {}
    return Trainer(config.trainer, config.exp_manager, config.algorithm, **(mocks | parts))
