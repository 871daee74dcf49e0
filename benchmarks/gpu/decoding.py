"""Decoding with the policy's own weights at the 1.5B shape: tokens a second by each way that the engine has.

`in_place` replays CUDA graphs; `in_place_without_graphs` launches the same code anew, with keys as wide as the cache;
`plain` has as many keys as tokens. `*_with_cudnn` lets SDPA take cuDNN's attention, which the engine leaves out.
"""

from __future__ import annotations

import time
from typing import Any

from setting import TEMPERATURE, Setting, build_policy, model_directory, peak_gb, reset_peak, wait
from torch.nn.attention import SDPBackend

from nemo_disco.generation import decoder, static
from nemo_disco.generation.engine import Sampling
from nemo_disco.generation.megatron import MegatronEngine

# Name, in place, graphs, cuDNN, and whether all tokens are decoded (else a quarter of them).
WAYS = (
    ("in_place", True, True, False, True),
    ("in_place_without_graphs", True, False, False, False),
    ("plain", False, False, False, False),
    ("in_place_with_cudnn", True, True, True, False),
    ("plain_with_cudnn", False, False, True, False),
)


def run(setting: Setting) -> dict[str, Any]:
    """Rows of prompts that stand twice each, none of which ends (the stop token is never drawn)."""
    shape, (rows, prompt, tokens) = setting.shape("1p5b"), setting.decoding()
    prompts = [[2 + (i * 7 + j) % (shape.vocab - 2) for j in range(prompt)] for i in range(rows // 2) for _ in "ab"]
    with model_directory(shape) as path:
        policy = build_policy(path, setting.size(8192, 200), with_optimizer=False)
    engine = MegatronEngine(policy, [shape.vocab])
    results: dict[str, Any] = {"rows": rows, "tokens_a_row": tokens}
    reset_peak()
    without_cudnn = list(decoder.BACKENDS)
    for name, in_place, graphs, cudnn, whole in WAYS:
        engine.in_place, static.GRAPHS = in_place, graphs
        decoder.BACKENDS = [SDPBackend.CUDNN_ATTENTION, *without_cudnn] if cudnn else without_cudnn
        try:
            results[name] = _measure(setting, engine, prompts, tokens if whole else tokens // 4)
        except Exception as error:  # one way that fails is a result, and stops no other
            results[name] = {"error": f"{type(error).__name__}: {error}"[:1000]}
    return results | {"peak_gb": peak_gb()}


def _measure(setting: Setting, engine: MegatronEngine, prompts: list[list[int]], tokens: int) -> dict[str, float]:
    rows = len(prompts)
    engine.generate(prompts, range(rows), Sampling(TEMPERATURE, setting.size(8, 2)))
    wait()
    start = time.perf_counter()
    responses = engine.generate(prompts, range(rows), Sampling(TEMPERATURE, tokens))
    wait()
    taken = time.perf_counter() - start
    sampled = sum(len(r.tokens) for r in responses)
    return {"tokens_per_second": sampled / taken, "seconds_a_step": taken / tokens}
