"""Sampling: our engine `megatron` against transformers' `generate`, on the same ragged prompts, on one core.

    OMP_NUM_THREADS=1 python benchmarks/generation.py [--limit 128 --repeats 5] [--output FILE.json]

The same model in float32, one batch, temperature 1. The prompts of a group are equal, as in training.
Twice: where responses stop early (mean a third of the limit), and where all run to the limit. Tokens are those of the
responses, EOS included. We also return log-probs; `generate` is not asked to.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import EOS, PAD, Runs, make_model, median, median_ratio, prompts, serve, take_turns, write_record
from transformers import AutoModelForCausalLM

TEMPERATURE = 1.0


def serve_transformers(args: argparse.Namespace, asked: list[list[int]]) -> None:
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    width = max(map(len, asked))
    ids = torch.tensor([[PAD] * (width - len(p)) + p for p in asked])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in asked])

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
        return {"tokens": tokens}

    serve(generate)


def serve_ours(args: argparse.Namespace, asked: list[list[int]]) -> None:
    from ours import build_algorithm, settings

    from nemo_disco.generation.engine import Sampling

    engine = build_algorithm(settings(args.model)).engine
    turn = 0

    def generate() -> dict[str, float]:
        nonlocal turn
        turn += 1
        seeds = range(turn * len(asked), (turn + 1) * len(asked))
        responses = engine.generate(asked, seeds, Sampling(TEMPERATURE, args.limit))
        return {"tokens": sum(len(r.tokens) for r in responses)}

    serve(generate)


def compare(args: argparse.Namespace, *, ends: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as work:
        model = make_model(Path(work), args.limit, ends=ends, hidden=args.hidden)
        command = [sys.executable, *sys.argv, f"--model={model}"]
        runs = take_turns({side: [*command, f"--side={side}"] for side in ("ours", "transformers")}, args.repeats)
    for turn in (turn for turns in runs.values() for turn in turns):
        turn["seconds_a_token"] = turn["seconds"] / turn["tokens"]
        turn["wall_seconds_a_token"] = turn["wall_seconds"] / turn["tokens"]
    return summary(args, runs)


def summary(args: argparse.Namespace, runs: Runs) -> dict[str, Any]:
    most = args.questions * args.group * args.limit
    return {
        "tokens_per_second": {side: 1 / median(turns, "seconds_a_token") for side, turns in runs.items()},
        "mean_length_of_limit": {side: median(turns, "tokens") / most for side, turns in runs.items()},
        "speedup": median_ratio(runs["transformers"], runs["ours"], "seconds_a_token"),
        "speedup_by_the_wall_clock": median_ratio(runs["transformers"], runs["ours"], "wall_seconds_a_token"),
        "runs": runs,
    }


def show(title: str, result: dict[str, Any]) -> None:
    print(title)
    for side, speed in result["tokens_per_second"].items():
        print(f"  {side:13}{speed:8.0f} tokens/s, mean length {result['mean_length_of_limit'][side]:.2f} of the limit")
    wall = f"({result['speedup_by_the_wall_clock']:.2f} by the wall clock)"
    print(f"  ours is {result['speedup']:.2f} times as fast {wall}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--group", type=int, default=8, help="responses a question")
    parser.add_argument("--limit", type=int, default=128, help="tokens of a response, at most")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--side", choices=["ours", "transformers"], help="used by the benchmark itself")
    parser.add_argument("--model", type=Path, help="used by the benchmark itself")
    args = parser.parse_args()
    if args.side:
        torch.set_num_threads(1)
        asked = [prompt for prompt in prompts(args.questions) for _ in range(args.group)]
        {"ours": serve_ours, "transformers": serve_transformers}[args.side](args, asked)
        return
    results = {}
    for name, ends in (("early stops", True), ("to the limit", False)):
        results[name] = compare(args, ends=ends)
        show(name, results[name])
    sizes = {name: getattr(args, name) for name in ("questions", "group", "limit", "hidden")}
    write_record(args.output, {"benchmark": "generation", "settings": sizes, "results": results})


if __name__ == "__main__":
    main()
