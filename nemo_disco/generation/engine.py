"""The contract between the loop and a rollout engine, on one screen.

An engine owns sampling and its copy of the weights. It does not own prompts' text, grading or the objective's old
log-probs (those come from the training engine). The loop never asks which engine runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class SamplingParams:
    """How to sample. temperature 0 is greedy; top_k 0 and top_p 1.0 mean the whole vocabulary."""

    temperature: float
    max_response_length: int
    top_p: float = 1.0
    top_k: int = 0


@dataclass(frozen=True, eq=False)  # `==` of arrays is an array
class Response:
    """One sampled response of n tokens, EOS included if it was sampled.

    log_probs [n]: of the full distribution on logits / temperature (before top-k and top-p; at temperature 0, of the
    plain logits).
    """

    tokens: NDArray[np.int64]
    log_probs: NDArray[np.float32]
    finish_reason: Literal["stop", "length"]
    weight_version: int


# Called with (place in the request, response) when a response is finished, on the one rank that has it.
Finished = Callable[[int, Response], None]
# Waits for the responses to a request, in order; takes the version of the policy's weights at that time. A collective.
Outstanding = Callable[[int], list[Response]]


class Engine(Protocol):
    """What samples responses for the loop: megatron (in process), vllm, tensorrt_llm."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: SamplingParams,
        finished: Finished | None = None,
    ) -> list[Response]:
        """One response a prompt, in order, all from the weights of the last update. Equal neighbouring prompts share
        their prefix. The same (prompt, seed, sampling, weights) gives the same response whatever else is in the call,
        as far as the engine's arithmetic does not depend on the batch. An engine that streams calls `finished` for
        each response; one that does not never calls it."""
        ...

    def update_weights(self, weights: Callable[[], Iterable[tuple[str, Tensor]]], version: int) -> None:
        """Take the policy's weights: `weights()` streams them under Hugging Face names, and may be called again while
        they are the policy's, to give them to a replica that was lost. Nothing is generated from a mixture."""
        ...

    def sleep(self) -> None:
        """Give memory back while the policy trains."""
        ...

    def wake(self) -> None:
        """Be ready for the next update_weights."""
        ...

    def close(self) -> None:
        """End, with every process and buffer that the engine started."""
        ...


class EngineApart(Engine, Protocol):
    """An engine in processes of its own, which can sample while the policy trains."""

    def ask(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: SamplingParams,
        finished: Finished | None = None,
    ) -> Outstanding:
        """`generate` in two halves: returns when sampling has begun, `finished` is called from a thread of its own, and
        nothing else may be asked of the engine until the result has been waited for. A replica that is lost meanwhile
        gets the policy's weights of then: what it had not answered is sampled from those, and says so."""
        ...
