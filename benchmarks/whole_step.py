"""Whole steps (sample, grade, train): our GRPO against TRL's GRPOTrainer, and our DisCO against our GRPO, on one core.

    OMP_NUM_THREADS=1 python benchmarks/whole_step.py [--limit 128 --repeats 5] [--output FILE.json]

The same model, questions, group size, length limit, mini-batches, sampling, clipping and learning rate, and a grader
that costs nothing. In float32. Twice: with responses that spread (mean a third of the limit), and with all at the
limit. TRL lives in an environment of its own, .venv-trl, which is made where it is missing (2 GB).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import HERE, Runs, make_model, median, median_ratio, serve, take_turns, write_record

TRL_ENVIRONMENT = HERE.parent / ".venv-trl"
LONGEST_PROMPT = 64
TOKENS = 4096  # in our micro-batches; TRL's are whole mini-batches


def trl_python() -> Path:
    """The interpreter of TRL's environment, made on first use. torch first, lest CUDA packages come with it."""
    python = TRL_ENVIRONMENT / "bin" / "python"
    if not (TRL_ENVIRONMENT / ".installed").exists():
        subprocess.run([sys.executable, "-m", "venv", str(TRL_ENVIRONMENT)], check=True)
        for packages in (["torch==2.13.0"], ["trl==1.16.0", "transformers>=5,<6"]):
            subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        (TRL_ENVIRONMENT / ".installed").touch()
    return python


def serve_ours(args: argparse.Namespace) -> None:
    from ours import build_algorithm, settings

    config = settings(
        args.model,
        [
            f"algorithm={args.side}",
            f"data.questions_per_step={args.questions}",
            f"algorithm.mini_batch_questions={args.questions // args.mini_batches}",
            f"generation.responses_per_question={args.group}",
            f"generation.max_response_length={args.limit}",
            f"model.token_budget={max(TOKENS, LONGEST_PROMPT + args.limit)}",
        ],
    )
    algorithm = build_algorithm(config)

    def step() -> dict[str, float]:
        metrics = algorithm.train_step()
        parts = {name: metrics[f"time/{name}"] for name in ("generate", "grade", "log_probs", "train", "refit")}
        return {"response_tokens": metrics["response/length_mean"] * args.questions * args.group, **parts}

    serve(step)


def compare(args: argparse.Namespace, *, ends: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as work:
        model = make_model(Path(work), args.limit, ends=ends, hidden=args.hidden)
        sizes = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in SIZES]
        ours = [sys.executable, str(HERE / "whole_step.py"), f"--model={model}", *sizes]
        commands = {name: [*ours, f"--side={name}"] for name in ("grpo", "disco")}
        if not args.without_trl:
            commands["trl"] = [str(trl_python()), str(HERE / "trl_worker.py"), f"--model={model}", *sizes]
        runs = take_turns(commands, args.repeats)
    return summary(args, runs)


def summary(args: argparse.Namespace, runs: Runs) -> dict[str, Any]:
    result: dict[str, Any] = {
        "steps_an_hour": {side: 3600 / median(turns, "seconds") for side, turns in runs.items()},
        "mean_length_of_limit": {
            side: median(turns, "response_tokens") / (args.questions * args.group * args.limit)
            for side, turns in runs.items()
        },
        "disco_over_grpo": median_ratio(runs["disco"], runs["grpo"], "seconds"),
        "runs": runs,
    }
    if "trl" in runs:
        result["speedup"] = median_ratio(runs["trl"], runs["grpo"], "seconds")
        result["speedup_by_the_wall_clock"] = median_ratio(runs["trl"], runs["grpo"], "wall_seconds")
    return result


def show(title: str, result: dict[str, Any]) -> None:
    print(title)
    for side, steps in result["steps_an_hour"].items():
        length = result["mean_length_of_limit"][side]
        print(f"  {side:6}{steps:8.0f} steps an hour, mean length {length:.2f} of the limit")
    if "speedup" in result:
        wall = f"({result['speedup_by_the_wall_clock']:.2f} by the wall clock)"
        print(f"  our GRPO makes {result['speedup']:.2f} times as many steps as TRL's {wall}")
    print(f"  our DisCO's step takes {result['disco_over_grpo']:.2f} times our GRPO's")


SIZES = ("questions", "group", "limit", "mini_batches")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=16, help="a step")
    parser.add_argument("--group", type=int, default=8, help="responses a question")
    parser.add_argument("--limit", type=int, default=128, help="tokens of a response, at most")
    parser.add_argument("--mini-batches", type=int, default=4, help="optimizer steps a step")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--without-trl", action="store_true", help="only our DisCO against our GRPO")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--side", choices=["grpo", "disco"], help="used by the benchmark itself")
    parser.add_argument("--model", type=Path, help="used by the benchmark itself")
    args = parser.parse_args()
    if args.side:
        serve_ours(args)
        return
    results = {}
    for name, ends in (("spread", True), ("full", False)):
        results[name] = compare(args, ends=ends)
        show({"spread": "lengths that spread", "full": "all responses at the limit"}[name], results[name])
    sizes = {name: getattr(args, name) for name in (*SIZES, "hidden")}
    write_record(args.output, {"benchmark": "whole_step", "settings": sizes, "results": results})


if __name__ == "__main__":
    main()
