"""Decoding with the policy's own weights at the 1.5B shape: tokens a second, in place (graphs on CUDA) and step by
step, against the time that reading weights and cache takes."""

from __future__ import annotations

import time
from typing import Any

from setting import TEMPERATURE, Setting, build_policy, model_directory, peak_gb, reset_peak, wait

from nemo_disco.generation.engine import Sampling
from nemo_disco.generation.megatron import MegatronEngine


def run(setting: Setting) -> dict[str, Any]:
    """128 rows of 16 prompts, 512 tokens each, none of which ends (the stop token is never drawn)."""
    shape = setting.shape("1p5b")
    rows, tokens, prompt = setting.size(128, 4), setting.size(512, 12), setting.size(128, 6)
    prompts = [[2 + (i * 7 + j) % (shape.vocab - 2) for j in range(prompt)] for i in range(rows // 2) for _ in "ab"]
    with model_directory(shape) as path:
        policy = build_policy(path, setting.size(8192, 200))
    engine = MegatronEngine(policy, [shape.vocab])
    bandwidth = setting.floor("copy_bytes_per_second")
    cache = 2 * 2 * shape.layers * shape.kv_width * rows * (prompt + tokens / 2)
    moved = 2 * (shape.parameters - shape.embedding_parameters) + cache
    results: dict[str, Any] = {"rows": rows, "tokens_a_row": tokens, "bytes_a_step": moved}
    reset_peak()
    for name, in_place, count in (("in_place", True, tokens), ("plain", False, min(tokens, setting.size(128, 12)))):
        engine.in_place = in_place
        engine.generate(prompts, range(rows), Sampling(TEMPERATURE, setting.size(8, 2)))
        wait()
        start = time.perf_counter()
        responses = engine.generate(prompts, range(rows), Sampling(TEMPERATURE, count))
        wait()
        taken = time.perf_counter() - start
        sampled = sum(len(r.tokens) for r in responses)
        results[name] = {"tokens_per_second": sampled / taken, "seconds_a_step": taken / count}
        if bandwidth is not None:
            results[name]["times_the_bandwidth_floor"] = taken / count / (moved / bandwidth)
    return results | {"peak_gb": peak_gb()}
