"""The prompts that these tests send to the fake engine (fake_engine.py), and a check of its responses."""

from __future__ import annotations

from fake_engine import response_tokens
from response_values import token_lists
from torch import Tensor

from nemo_disco.generation.engine import Response, SamplingParams
from nemo_disco.generation.external.engine import ExternalEngine
from nemo_disco.generation.worker.rollout_worker.tensors import checksum

PROMPTS = [[n, n + 1] for n in range(6) for _ in range(4)]
SEEDS = list(range(len(PROMPTS)))
SAMPLING = SamplingParams(1.0, 20)


def sample(engine: ExternalEngine) -> list[Response]:
    return engine.generate(PROMPTS, SEEDS, SAMPLING)


def come_from(responses: list[Response], tensors: dict[str, Tensor], version: int) -> bool:
    """True if all responses were sampled from exactly these weights and carry this version."""
    sums = {name: checksum(t) for name, t in tensors.items()}
    expected = [response_tokens(sums, p, s, SAMPLING.max_response_length) for p, s in zip(PROMPTS, SEEDS, strict=True)]
    return token_lists(responses) == expected and {r.weight_version for r in responses} == {version}
