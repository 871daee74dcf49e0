"""Decoding by the engine `megatron` at the 1.5B shape: tokens per second of each variant.

`in_place` replays CUDA graphs, with keys as wide as the cache; `in_place_without_graphs` launches the same kernels one
by one; `plain` has as many keys as tokens. `*_with_cudnn` lets SDPA use cuDNN's attention, which the engine excludes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from setting import (
    TEMPERATURE,
    Setting,
    build_policy,
    model_directory,
    override_attributes,
    peak_gb,
    reset_peak,
    synchronize,
)
from torch.nn.attention import SDPBackend

from nemo_disco.generation.engine import SamplingParams
from nemo_disco.generation.megatron import decoder
from nemo_disco.generation.megatron import in_place as graph_decoding
from nemo_disco.generation.megatron.engine import MegatronEngine

# For each variant, the default on a GPU first: whether it decodes in place, by CUDA graphs, with cuDNN.
VARIANTS = {
    "in_place": (True, True, False),
    "in_place_without_graphs": (True, False, False),
    "plain": (False, False, False),
    "in_place_with_cudnn": (True, True, True),
    "plain_with_cudnn": (False, False, True),
}
FULL_LENGTH = ("in_place",)  # these variants decode all tokens, the others a quarter of them


def make_variants(engine: MegatronEngine) -> dict[str, AbstractContextManager[None]]:
    """For each variant a context in which the engine decodes by it. A context can be entered once."""
    return {name: _variant(engine, *settings) for name, settings in VARIANTS.items()}


@contextmanager
def _variant(engine: MegatronEngine, in_place: bool, graphs: bool, cudnn: bool) -> Iterator[None]:
    backends = [*([SDPBackend.CUDNN_ATTENTION] if cudnn else []), *decoder.BACKENDS]
    with (
        override_attributes(engine, in_place=in_place),
        override_attributes(graph_decoding, GRAPHS=graphs),
        override_attributes(decoder, BACKENDS=backends),
    ):
        yield


def run(setting: Setting) -> dict[str, Any]:
    """Speed of each variant by its name, or the error that it raised; also the peak memory.

    There are two responses to each prompt, and none ends early, because the stop token is never drawn.
    """
    shape, (rows, prompt, tokens) = setting.shape("1p5b"), setting.decoding_sizes()
    prompts = [[2 + (i * 7 + j) % (shape.vocab - 2) for j in range(prompt)] for i in range(rows // 2) for _ in "ab"]
    with model_directory(shape) as path:
        policy = build_policy(path, setting.size(8192, 200), with_optimizer=False)
    engine = MegatronEngine(policy, [shape.vocab])
    results: dict[str, Any] = {"rows": rows, "tokens_a_row": tokens}
    reset_peak()
    for name, variant in make_variants(engine).items():
        try:
            with variant:
                results[name] = _measure(setting, engine, prompts, tokens if name in FULL_LENGTH else tokens // 4)
        except Exception as error:  # a failure is this variant's result; the others still run
            results[name] = {"error": f"{type(error).__name__}: {error}"[:1000]}
    return results | {"peak_gb": peak_gb()}


def _measure(setting: Setting, engine: MegatronEngine, prompts: list[list[int]], tokens: int) -> dict[str, float]:
    """Tokens per second over all rows, and seconds per decoding step, after a short warm-up."""
    rows = len(prompts)
    engine.generate(prompts, range(rows), SamplingParams(TEMPERATURE, setting.size(8, 2)))
    synchronize()
    start = time.perf_counter()
    responses = engine.generate(prompts, range(rows), SamplingParams(TEMPERATURE, tokens))
    synchronize()
    duration_s = time.perf_counter() - start
    sampled = sum(len(r.tokens) for r in responses)
    return {"tokens_per_second": sampled / duration_s, "seconds_a_step": duration_s / tokens}
