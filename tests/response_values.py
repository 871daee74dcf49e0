"""Responses as plain Python values, which tests can compare: `==` of two Response objects is identity."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from nemo_disco.generation.engine import Response


def token_lists(responses: Iterable[Response]) -> list[list[int]]:
    """The tokens of each response."""
    return [r.tokens.tolist() for r in responses]


def as_tuples(responses: Iterable[Response]) -> list[tuple[list[int], list[float], str, int]]:
    """(tokens, log_probs, finish_reason, weight_version) of each response.

    Fails if an array has another type than the engines' contract says, or if the two differ in length.
    """
    tuples = []
    for r in responses:
        assert (r.tokens.dtype, r.log_probs.dtype) == (np.int64, np.float32)
        assert r.tokens.shape == r.log_probs.shape == (len(r.tokens),)
        tuples.append((r.tokens.tolist(), r.log_probs.tolist(), r.finish_reason, r.weight_version))
    return tuples
