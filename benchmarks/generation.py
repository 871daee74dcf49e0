"""Sampling: the engines and transformers' `generate`, on the same ragged prompts, on one core.

    OMP_NUM_THREADS=1 python benchmarks/generation.py [--vllm PYTHON] [--limit 128 --repeats 5] [--output FILE.json]

The same model in float32, temperature 1, one request of all prompts. The prompts of a group are equal, as in training.
Twice: where responses stop early (mean a third of the limit), and where all run to the limit. Tokens are those of the
responses, EOS included. The engines also return log-probs; `generate` is not asked to. A turn's seconds are the
processor's, of vLLM with its worker's. TensorRT-LLM needs a GPU: not run.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import (
    EOS,
    PAD,
    Runs,
    alive_seconds,
    make_model,
    median,
    median_ratio,
    prompts,
    serve,
    take_turns,
    write_record,
)
from transformers import AutoModelForCausalLM

from nemo_disco.generation.engine import Engine, SamplingParams
from nemo_disco.generation.external.engine import ExternalEngine

TEMPERATURE = 1.0


def serve_transformers(args: argparse.Namespace, requests: list[list[int]]) -> None:
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    width = max(map(len, requests))
    ids = torch.tensor([[PAD] * (width - len(p)) + p for p in requests])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in requests])

    def generate() -> dict[str, float]:
        out = model.generate(
            ids,
            attention_mask=mask,
            do_sample=True,
            temperature=TEMPERATURE,
            top_k=0,
            top_p=1.0,
            max_new_tokens=args.limit,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )[:, width:]
        ended = out == EOS
        tokens = int(((ended.cumsum(-1) - ended.long()) == 0).sum())  # up to the first EOS and with it
        return {"tokens": tokens, "start": ready}

    ready = alive_seconds()
    serve(generate)


def serve_megatron(args: argparse.Namespace, requests: list[list[int]]) -> None:
    from ours import build_algorithm, settings

    serve_engine(args, requests, build_algorithm(settings(args.model)).engine, {})


def serve_vllm(args: argparse.Namespace, requests: list[list[int]]) -> None:
    """With its options as a run has them, but for the size of the cache."""
    from ours import settings

    from nemo_disco.generation.build import build_engine
    from nemo_disco.policy import parallel
    from nemo_disco.policy.policy import Policy

    overrides = ["generation=vllm", f"generation.python={args.vllm}"]
    config = settings(args.model, [*overrides, "generation.options={kv_cache_memory_bytes: 268435456}"])
    parallel.start(config.model)
    policy = Policy(config.model, trainable=False)
    longest = max(map(len, requests)) + args.limit
    engine = build_engine(config.generation, policy, [EOS], max_length=longest, logs=args.model / "engines")
    assert isinstance(engine, ExternalEngine)
    engine.update_weights(policy.named_weights, 0)
    parts = {f"start_{name}": seconds for name, seconds in engine.replicas[0].start_seconds.items()}
    process = engine.replicas[0]._process
    assert process is not None
    try:
        serve_engine(args, requests, engine, parts, process.pid)
    finally:
        engine.close()


def serve_engine(
    args: argparse.Namespace,
    requests: list[list[int]],
    engine: Engine,
    parts: dict[str, float],
    worker: int | None = None,
) -> None:
    parts["start"] = alive_seconds()
    turn = 0

    def generate() -> dict[str, float]:
        nonlocal turn
        turn += 1
        seeds = range(turn * len(requests), (turn + 1) * len(requests))
        responses = engine.generate(requests, seeds, SamplingParams(TEMPERATURE, args.limit))
        return {"tokens": sum(len(r.tokens) for r in responses), **parts}

    serve(generate, worker)


SIDES = {"megatron": serve_megatron, "vllm": serve_vllm, "transformers": serve_transformers}


def compare(args: argparse.Namespace, *, ends: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as work:
        model = make_model(Path(work), args.limit, ends=ends, hidden=args.hidden)
        command = [sys.executable, *sys.argv, f"--model={model}"]
        sides = [side for side in SIDES if side != "vllm" or args.vllm]
        runs = take_turns({side: [*command, f"--side={side}"] for side in sides}, args.repeats)
    for turn in (turn for turns in runs.values() for turn in turns):
        turn["seconds_a_token"] = turn["seconds"] / turn["tokens"]
        turn["wall_seconds_a_token"] = turn["wall_seconds"] / turn["tokens"]
    return summary(args, runs)


def summary(args: argparse.Namespace, runs: Runs) -> dict[str, Any]:
    most = args.questions * args.group * args.limit
    others = [side for side in runs if side != "transformers"]

    def speedup(unit: str) -> dict[str, float]:
        return {side: median_ratio(runs["transformers"], runs[side], unit) for side in others}

    return {
        "tokens_per_second": {side: 1 / median(turns, "seconds_a_token") for side, turns in runs.items()}
        | {"tensorrt_llm": "not run"},
        "mean_length_of_limit": {side: median(turns, "tokens") / most for side, turns in runs.items()},
        "start_seconds": {
            side: {name: turns[0][name] for name in turns[0] if name.startswith("start")}
            for side, turns in runs.items()
        },
        "times_transformers": speedup("seconds_a_token"),
        "times_transformers_by_the_wall_clock": speedup("wall_seconds_a_token"),
        "runs": runs,
    }


def show(title: str, result: dict[str, Any]) -> None:
    print(title)
    for side, length in result["mean_length_of_limit"].items():
        speed = f"{result['tokens_per_second'][side]:8.0f} tokens/s, mean length {length:.2f} of the limit"
        if side in result["times_transformers"]:
            wall = result["times_transformers_by_the_wall_clock"][side]
            speed += f", {result['times_transformers'][side]:.2f} x generate ({wall:.2f} by the wall clock)"
        start = ", ".join(f"{name} {s:.1f} s" for name, s in result["start_seconds"][side].items())
        print(f"  {side:13}{speed}; {start}")
    print("  tensorrt_llm  not run")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--group", type=int, default=8, help="responses a question")
    parser.add_argument("--limit", type=int, default=128, help="tokens of a response, at most")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--vllm", metavar="PYTHON", help="the interpreter that has vLLM; without it vLLM is left out")
    parser.add_argument("--side", choices=SIDES, help="used by the benchmark itself")
    parser.add_argument("--model", type=Path, help="used by the benchmark itself")
    args = parser.parse_args()
    if args.side:
        torch.set_num_threads(1)
        requests = [prompt for prompt in prompts(args.questions) for _ in range(args.group)]
        SIDES[args.side](args, requests)
        return
    results = {}
    for name, ends in (("early stops", True), ("to the limit", False)):
        results[name] = compare(args, ends=ends)
        show(name, results[name])
    sizes = {name: getattr(args, name) for name in ("questions", "group", "limit", "hidden")}
    write_record(args.output, {"benchmark": "generation", "settings": sizes, "results": results})


if __name__ == "__main__":
    main()
