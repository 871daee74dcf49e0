"""A worker for refit.py whose engine stores the weights and does nothing else: the cost of a refit without an engine.

Run by fake_python of tests/fake_engine.py in place of the module rollout_worker.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nemo_disco.generation.worker.rollout_worker.tensors import Assembly
from nemo_disco.generation.worker.rollout_worker.wire import map_staging


class PlainEngine:
    """Engine on the CPU that receives refits and cannot generate."""

    gpu = False

    def __init__(self, settings: dict[str, Any]) -> None:  # noqa: ARG002
        self.weights: dict[str, Tensor] = {}

    def open_staging(self, path: str, shape: tuple[int, int], remote: bool) -> list[dict[str, Any]]:  # noqa: ARG002
        self.slots = map_staging(path, shape)
        return [{}]

    def receive(self, slot: int) -> None:
        """Do nothing, since on a CPU the weights already lie in the shared staging memory."""

    def begin_refit(self) -> None:
        """Begin to receive weights into the tensors of the last refit, as the plain copy writes to the same tensors."""
        self.assembly = Assembly(self._allocate)

    def _allocate(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        if name not in self.weights:
            self.weights[name] = torch.empty(shape, dtype=dtype)
        return self.weights[name]

    def load_bucket(self, slot: int, pieces: Sequence[Any]) -> dict[str, str]:
        return {name: checksum for name, _, checksum in self.assembly.take(self.slots[slot], pieces)}

    def finish_refit(self) -> None: ...

    def abort_refit(self) -> None: ...


if __name__ == "__main__":
    import rollout_worker.__main__ as worker

    worker._build_engine = PlainEngine
    worker.main()
