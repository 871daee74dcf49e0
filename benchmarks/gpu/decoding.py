"""Decoding with the policy's own weights at the 1.5B shape: tokens a second by each way that the engine has.

`in_place` replays CUDA graphs; `in_place_without_graphs` launches the same code anew, with keys as wide as the cache;
`plain` has as many keys as tokens. `*_with_cudnn` lets SDPA take cuDNN's attention, which the engine leaves out.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from setting import TEMPERATURE, Setting, build_policy, changed, model_directory, peak_gb, reset_peak, wait
from torch.nn.attention import SDPBackend

from nemo_disco.generation.engine import SamplingParams
from nemo_disco.generation.megatron import decoder
from nemo_disco.generation.megatron import in_place as graph_decoding
from nemo_disco.generation.megatron.engine import MegatronEngine

# What each way is: in place, by graphs, with cuDNN.
WAYS = {
    "in_place": (True, True, False),
    "in_place_without_graphs": (True, False, False),
    "plain": (False, False, False),
    "in_place_with_cudnn": (True, True, True),
    "plain_with_cudnn": (False, False, True),
}
WHOLE = ("in_place",)  # decodes all tokens, the others a quarter of them


def ways(engine: MegatronEngine) -> dict[str, AbstractContextManager[None]]:
    """The settings of each way; each may be entered once."""
    return {name: _way(engine, *settings) for name, settings in WAYS.items()}


@contextmanager
def _way(engine: MegatronEngine, in_place: bool, graphs: bool, cudnn: bool) -> Iterator[None]:
    backends = [*([SDPBackend.CUDNN_ATTENTION] if cudnn else []), *decoder.BACKENDS]
    with (
        changed(engine, in_place=in_place),
        changed(graph_decoding, GRAPHS=graphs),
        changed(decoder, BACKENDS=backends),
    ):
        yield


def run(setting: Setting) -> dict[str, Any]:
    """Rows of prompts that stand twice each, none of which ends (the stop token is never drawn)."""
    shape, (rows, prompt, tokens) = setting.shape("1p5b"), setting.decoding()
    prompts = [[2 + (i * 7 + j) % (shape.vocab - 2) for j in range(prompt)] for i in range(rows // 2) for _ in "ab"]
    with model_directory(shape) as path:
        policy = build_policy(path, setting.size(8192, 200), with_optimizer=False)
    engine = MegatronEngine(policy, [shape.vocab])
    results: dict[str, Any] = {"rows": rows, "tokens_a_row": tokens}
    reset_peak()
    for name, way in ways(engine).items():
        try:
            with way:
                results[name] = _measure(setting, engine, prompts, tokens if name in WHOLE else tokens // 4)
        except Exception as error:  # one way that fails is a result, and stops no other
            results[name] = {"error": f"{type(error).__name__}: {error}"[:1000]}
    return results | {"peak_gb": peak_gb()}


def _measure(setting: Setting, engine: MegatronEngine, prompts: list[list[int]], tokens: int) -> dict[str, float]:
    rows = len(prompts)
    engine.generate(prompts, range(rows), SamplingParams(TEMPERATURE, setting.size(8, 2)))
    wait()
    start = time.perf_counter()
    responses = engine.generate(prompts, range(rows), SamplingParams(TEMPERATURE, tokens))
    wait()
    taken = time.perf_counter() - start
    sampled = sum(len(r.tokens) for r in responses)
    return {"tokens_per_second": sampled / taken, "seconds_a_step": taken / tokens}
