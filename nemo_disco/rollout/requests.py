"""Requests to an engine: one response to each prompt, as packed rollouts and as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

from nemo_disco.data.chat import decode
from nemo_disco.data.rollouts import Rollouts
from nemo_disco.generation.engine import Engine, Finished, Response, SamplingParams
from nemo_disco.rollout.prompts import PromptSet

T = TypeVar("T")


def sample_responses(
    engine: Engine, picked: PromptSet, seeds: Sequence[int], sampling: SamplingParams, finished: Finished | None = None
) -> tuple[Rollouts, list[str]]:
    """One response to each question of `picked`, packed and as text (without the token that ended it)."""
    return packed(picked, engine.generate(picked.prompts, seeds, sampling, finished))


def packed(picked: PromptSet, responses: Sequence[Response]) -> tuple[Rollouts, list[str]]:
    """What an engine answered to `picked`."""
    rollouts = Rollouts.from_lists(
        picked.prompts,
        [np.asarray(r.tokens).tolist() for r in responses],
        [np.asarray(r.log_probs).tolist() for r in responses],
        [q.id for q in picked.questions],
        [r.finish_reason == "length" for r in responses],
        [r.weight_version for r in responses],
    )
    return rollouts, [response_text(picked.tokenizer, r) for r in responses]


def response_text(tokenizer: Any, response: Response) -> str:
    """Without the token that ended it."""
    ended = response.finish_reason == "stop"
    return decode(tokenizer, np.asarray(response.tokens[:-1] if ended else response.tokens).tolist())
