"""The contract between the trainer and a rollout engine, on one screen.

An engine owns sampling and its copy of the weights. It does not own the prompts' text, grading or the objective's old
log-probs (those are the policy's own). The trainer does not depend on which engine runs.
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
    """Sampling parameters of a request. Temperature 0 is greedy; top_k 0 and top_p 1.0 keep the whole vocabulary.
    routes: return the experts of each token too."""

    temperature: float
    max_response_length: int
    top_p: float = 1.0
    top_k: int = 0
    routes: bool = False


@dataclass(frozen=True, eq=False)  # `==` of arrays is an array
class Response:
    """One sampled response of n tokens, EOS included if it was sampled.

    log_probs [n]: of the full distribution on logits / temperature (before top-k and top-p; at temperature 0, of the
    plain logits). weight_version: the step after which the weights that sampled it were put into the engine.
    routes [p + n - 1, layers, K]: the experts of the tokens that the engine's pass read, the p of the prompt included
    and the last of the response not; uint8 for up to 256 experts, else int16. None where they were not asked for.
    """

    tokens: NDArray[np.int64]
    log_probs: NDArray[np.float32]
    finish_reason: Literal["stop", "length"]
    weight_version: int
    routes: NDArray[np.uint8 | np.int16] | None = None


# Called with (index of the prompt, response) when a response is complete, on exactly one rank.
Deliver = Callable[[int, Response], None]
# Waits for the responses and returns them in order. Argument: the version of the policy's weights. A collective.
PendingResponses = Callable[[int], list[Response]]


class Engine(Protocol):
    """Samples responses for the trainer: megatron (in its processes), vllm, tensorrt_llm."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: SamplingParams,
        deliver: Deliver | None = None,
    ) -> list[Response]:
        """Sample one response to each prompt from the weights of the last update; returns them in order. Equal prompts
        in a row share their prefix. The same (prompt, seed, sampling, weights) gives the same response whatever else is
        in the call, as far as the engine's arithmetic does not depend on the batch. An engine that streams calls
        `deliver` for each response as it ends; other engines never call it."""
        ...

    def update_weights(self, weights: Callable[[], Iterable[tuple[str, Tensor]]], version: int) -> None:
        """Refit: put the policy's weights into the engine. `weights()` streams them under Hugging Face names; until the
        next update it may be called again, for a lost replica. No response comes from a mixture of versions."""
        ...

    def sleep(self) -> None:
        """Free GPU memory while the policy trains."""
        ...

    def wake(self) -> None:
        """Prepare for the next update_weights."""
        ...

    def close(self) -> None:
        """Stop every process and free every buffer of the engine."""
        ...


class AsynchronousEngine(Engine, Protocol):
    """An engine in processes of its own, which can sample while the policy trains."""

    def start_generating(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: SamplingParams,
        deliver: Deliver | None = None,
    ) -> PendingResponses:
        """Start `generate` and return while it samples; another thread calls `deliver`. The returned function must be
        called before any other request to the engine. It samples again the prompts that a lost replica did not answer,
        from the policy's weights at that time, whose version these responses then have."""
        ...
