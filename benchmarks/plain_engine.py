"""A worker whose engine only keeps the weights: what a refit costs before any engine's own work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nemo_disco.generation.worker.rollout_worker.tensors import Assembly
from nemo_disco.generation.worker.rollout_worker.wire import map_staging


class PlainEngine:
    gpu = False

    def __init__(self, settings: dict[str, Any]) -> None:  # noqa: ARG002
        self.weights: dict[str, Tensor] = {}

    def open_staging(self, path: str, shape: tuple[int, int], remote: bool) -> list[dict[str, Any]]:  # noqa: ARG002
        self.slots = map_staging(path, shape)
        return [{}]

    def receive(self, slot: int) -> None:
        """Do nothing: on a CPU there is no broadcast."""

    def begin_refit(self) -> None:
        """The weights stay where they are, as a plain copy's target does."""
        self.assembly = Assembly(self._place)

    def _place(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
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
