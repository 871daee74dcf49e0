"""Speed of sampling on one core: the engines against transformers' `generate`, on the same prompts of unequal lengths.

    OMP_NUM_THREADS=1 python benchmarks/generation.py [--vllm PYTHON] [--before CHECKOUT] [--repeats 5] [--output FILE]

All sample from the same model in float32 at temperature 1, with all prompts in one request; the prompts of a group are
equal, as in training. There are two experiments: responses that stop early (their mean length is a third of the limit),
and responses that all run to the limit. Speeds count the tokens of the responses, with EOS, and processor seconds; for
vLLM these include its worker's. The engines also return log-probs, which `generate` is not asked for. TensorRT-LLM
needs a GPU and is not run.
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
    TurnsBySide,
    make_model,
    make_prompts,
    median,
    median_ratio,
    seconds_since_start,
    serve,
    take_turns,
    write_record,
)
from transformers import AutoModelForCausalLM

from nemo_disco.generation.engine import Engine, SamplingParams
from nemo_disco.generation.external.engine import ExternalEngine

TEMPERATURE = 1.0


def serve_transformers(args: argparse.Namespace, requests: list[list[int]]) -> None:
    """Take this side's turns with transformers' `generate`, on prompts padded on the left."""
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
        is_eos = out == EOS
        tokens = int(((is_eos.cumsum(-1) - is_eos.long()) == 0).sum())  # up to the first EOS and with it
        return {"tokens": tokens, "start": start_up_seconds}

    start_up_seconds = seconds_since_start()
    serve(generate)


def serve_megatron(args: argparse.Namespace, requests: list[list[int]]) -> None:
    """Take this side's turns with the trainer's own engine."""
    from benchmark_trainer import build_benchmark_trainer, compose_config

    serve_engine(args, requests, build_benchmark_trainer(compose_config(args.model)).engine, {})


def serve_vllm(args: argparse.Namespace, requests: list[list[int]]) -> None:
    """Take this side's turns with vLLM, with the options of a run except for the size of the KV cache."""
    from benchmark_trainer import compose_config

    from nemo_disco.generation.build import build_engine
    from nemo_disco.policy import parallel
    from nemo_disco.policy.policy import Policy

    overrides = ["generation=vllm", f"generation.python={args.vllm}"]
    config = compose_config(args.model, [*overrides, "generation.options={kv_cache_memory_bytes: 268435456}"])
    parallel.start(config.model)
    policy = Policy(config.model, trainable=False)
    longest = max(map(len, requests)) + args.limit
    engine = build_engine(config.generation, policy, [EOS], max_length=longest, logs=args.model / "engines")
    assert isinstance(engine, ExternalEngine)
    engine.update_weights(policy.named_weights, 0)
    start_parts = {f"start_{name}": seconds for name, seconds in engine.replicas[0].start_seconds.items()}
    process = engine.replicas[0]._process
    assert process is not None
    try:
        serve_engine(args, requests, engine, start_parts, process.pid)
    finally:
        engine.close()


def serve_engine(
    args: argparse.Namespace,
    requests: list[list[int]],
    engine: Engine,
    start_parts: dict[str, float],
    worker_pid: int | None = None,
) -> None:
    """Take this side's turns with an engine, and report in each the tokens that it sampled and its start-up seconds.

    start_parts: figures `start_<part>`, seconds of the parts of the start-up. worker_pid: the engine's own process.
    """
    start_up_seconds = start_parts | {"start": seconds_since_start()}
    turn = 0

    def generate() -> dict[str, float]:
        nonlocal turn
        turn += 1
        seeds = range(turn * len(requests), (turn + 1) * len(requests))
        responses = engine.generate(requests, seeds, SamplingParams(TEMPERATURE, args.limit))
        return {"tokens": sum(len(r.tokens) for r in responses), **start_up_seconds}

    serve(generate, worker_pid)


SIDES = {"megatron": serve_megatron, "vllm": serve_vllm, "transformers": serve_transformers}


def compare(args: argparse.Namespace, *, ends: bool) -> dict[str, Any]:
    """Run one experiment and return its results. ends: whether responses stop early (see make_model)."""
    with tempfile.TemporaryDirectory() as work:
        model = make_model(Path(work), args.limit, ends=ends, hidden=args.hidden)
        command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], f"--model={model}"]
        commands = {side: [*command, f"--side={side}"] for side in SIDES if side != "vllm" or args.vllm}
        if args.before:
            checkout = args.before.resolve()  # whose conf/ is read from the working directory
            commands = {
                "before": ["env", "-C", str(checkout), f"PYTHONPATH={checkout}", *commands["megatron"]],
                **commands,
            }
        turns_by_side = take_turns(commands, args.repeats)
    for turn in (turn for turns in turns_by_side.values() for turn in turns):
        turn["seconds_a_token"] = turn["seconds"] / turn["tokens"]
        turn["wall_seconds_a_token"] = turn["wall_seconds"] / turn["tokens"]
    return summarize(args, turns_by_side)


def summarize(args: argparse.Namespace, turns_by_side: TurnsBySide) -> dict[str, Any]:
    """The results of one experiment: medians over turns for each side, ratios to transformers, and all turns."""
    most_tokens = args.questions * args.group * args.limit
    engines = [side for side in turns_by_side if side != "transformers"]

    def speedups(figure: str) -> dict[str, float]:
        return {side: median_ratio(turns_by_side["transformers"], turns_by_side[side], figure) for side in engines}

    return {
        "tokens_per_second": {side: 1 / median(turns, "seconds_a_token") for side, turns in turns_by_side.items()}
        | {"tensorrt_llm": "not run"},
        "mean_length_of_limit": {side: median(turns, "tokens") / most_tokens for side, turns in turns_by_side.items()},
        "start_seconds": {
            side: {name: turns[0][name] for name in turns[0] if name.startswith("start")}
            for side, turns in turns_by_side.items()
        },
        "times_transformers": speedups("seconds_a_token"),
        "times_before": median_ratio(turns_by_side["before"], turns_by_side["megatron"], "seconds_a_token")
        if "before" in turns_by_side
        else None,
        "times_transformers_by_the_wall_clock": speedups("wall_seconds_a_token"),
        "runs": turns_by_side,
    }


def print_result(title: str, result: dict[str, Any]) -> None:
    print(title)
    for side, length in result["mean_length_of_limit"].items():
        speed = f"{result['tokens_per_second'][side]:8.0f} tokens/s, mean length {length:.2f} of the limit"
        if side in result["times_transformers"]:
            wall = result["times_transformers_by_the_wall_clock"][side]
            speed += f", {result['times_transformers'][side]:.2f} x transformers ({wall:.2f} by the wall clock)"
        start = ", ".join(f"{name} {s:.1f} s" for name, s in result["start_seconds"][side].items())
        print(f"  {side:13}{speed}; {start}")
    if result["times_before"] is not None:
        print(f"  megatron is {result['times_before']:.3f} x as fast as the other checkout's")
    print("  tensorrt_llm  not run: it needs a GPU")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--group", type=int, default=8, help="responses to each question")
    parser.add_argument("--limit", type=int, default=128, help="the most tokens of a response")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--vllm", metavar="PYTHON", help="the interpreter that has vLLM; without it vLLM is left out")
    parser.add_argument("--before", type=Path, metavar="CHECKOUT", help="whose megatron engine takes turns as well")
    parser.add_argument("--side", choices=SIDES, help="used by the benchmark itself")
    parser.add_argument("--model", type=Path, help="used by the benchmark itself")
    args = parser.parse_args()
    if args.side:
        torch.set_num_threads(1)
        requests = [prompt for prompt in make_prompts(args.questions) for _ in range(args.group)]
        SIDES[args.side](args, requests)
        return
    results = {}
    for name, ends in (("early stops", True), ("to the limit", False)):
        results[name] = compare(args, ends=ends)
        print_result(name, results[name])
    sizes = {name: getattr(args, name) for name in ("questions", "group", "limit", "hidden")}
    write_record(args.output, {"benchmark": "generation", "settings": sizes, "results": results})


if __name__ == "__main__":
    main()
