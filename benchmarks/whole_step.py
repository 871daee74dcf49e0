"""Speed of whole steps (sample, grade, train) on one core: our GRPO against TRL's, and our DisCO against our GRPO.

    OMP_NUM_THREADS=1 python benchmarks/whole_step.py [--limit 128 --repeats 5] [--output FILE.json]

All sides have the same model in float32, questions, group size, response limit, mini-batches, sampling, clipping and
learning rate, and a grader that costs nothing. There are two experiments: response lengths that spread (their mean is a
third of the limit), and all responses at the limit. TRL has an environment of its own, .venv-trl, which the script
makes if it is missing (2 GB).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import HERE, TurnsBySide, make_model, median, median_ratio, serve, take_turns, write_record

TRL_ENVIRONMENT = HERE.parent / ".venv-trl"
LONGEST_PROMPT = 64
TOKEN_BUDGET = 4096  # tokens of our micro-batches; TRL's micro-batches are whole mini-batches


def prepare_trl_python() -> Path:
    """Make TRL's environment if it is missing, and return its Python interpreter.

    torch is installed first, by its exact version, since TRL's requirement would bring gigabytes of CUDA packages.
    """
    python = TRL_ENVIRONMENT / "bin" / "python"
    if not (TRL_ENVIRONMENT / ".installed").exists():
        subprocess.run([sys.executable, "-m", "venv", str(TRL_ENVIRONMENT)], check=True)
        for packages in (["torch==2.13.0"], ["trl==1.16.0", "transformers>=5,<6"]):
            subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        (TRL_ENVIRONMENT / ".installed").touch()
    return python


def serve_side(args: argparse.Namespace) -> None:
    """Take the turns of our side `args.side`, grpo or disco: one whole step each."""
    from benchmark_trainer import build_benchmark_trainer, compose_config

    config = compose_config(
        args.model,
        [
            f"algorithm={args.side}",
            f"data.questions_per_step={args.questions}",
            f"algorithm.mini_batch_questions={args.questions // args.mini_batches}",
            f"generation.responses_per_question={args.group}",
            f"generation.max_response_length={args.limit}",
            f"model.token_budget={max(TOKEN_BUDGET, LONGEST_PROMPT + args.limit)}",
        ],
    )
    trainer = build_benchmark_trainer(config)

    def step() -> dict[str, float]:
        metrics = trainer.train_step()
        parts = {name: metrics[f"time/{name}"] for name in ("generate", "grade", "log_probs", "train", "refit")}
        return {"response_tokens": metrics["response/length_mean"] * args.questions * args.group, **parts}

    serve(step)


def compare(args: argparse.Namespace, *, ends: bool) -> dict[str, Any]:
    """Run one experiment and return its results. ends: whether response lengths spread (see make_model)."""
    with tempfile.TemporaryDirectory() as work:
        model = make_model(Path(work), args.limit, ends=ends, hidden=args.hidden)
        sizes = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in SIZES]
        command = [sys.executable, str(HERE / "whole_step.py"), f"--model={model}", *sizes]
        commands = {name: [*command, f"--side={name}"] for name in ("grpo", "disco")}
        if not args.without_trl:
            commands["trl"] = [str(prepare_trl_python()), str(HERE / "trl_worker.py"), f"--model={model}", *sizes]
        turns_by_side = take_turns(commands, args.repeats)
    return summarize(args, turns_by_side)


def summarize(args: argparse.Namespace, turns_by_side: TurnsBySide) -> dict[str, Any]:
    """The results of one experiment: medians over turns, ratios between the sides, and all turns."""
    grpo = turns_by_side["grpo"]
    result: dict[str, Any] = {
        "steps_an_hour": {side: 3600 / median(turns, "seconds") for side, turns in turns_by_side.items()},
        "mean_length_of_limit": {
            side: median(turns, "response_tokens") / (args.questions * args.group * args.limit)
            for side, turns in turns_by_side.items()
        },
        "disco_over_grpo": median_ratio(turns_by_side["disco"], grpo, "seconds"),
        "runs": turns_by_side,
    }
    if "trl" in turns_by_side:
        result["speedup"] = median_ratio(turns_by_side["trl"], grpo, "seconds")
        result["speedup_by_the_wall_clock"] = median_ratio(turns_by_side["trl"], grpo, "wall_seconds")
    return result


def print_result(title: str, result: dict[str, Any]) -> None:
    print(title)
    for side, steps in result["steps_an_hour"].items():
        length = result["mean_length_of_limit"][side]
        print(f"  {side:6}{steps:8.0f} steps an hour, mean length {length:.2f} of the limit")
    if "speedup" in result:
        wall = f"({result['speedup_by_the_wall_clock']:.2f} by the wall clock)"
        print(f"  our GRPO makes {result['speedup']:.2f} times as many steps as TRL's {wall}")
    print(f"  a step of our DisCO takes {result['disco_over_grpo']:.2f} times as long as one of our GRPO")


SIZES = ("questions", "group", "limit", "mini_batches")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=16, help="questions of a step")
    parser.add_argument("--group", type=int, default=8, help="responses to each question")
    parser.add_argument("--limit", type=int, default=128, help="the most tokens of a response")
    parser.add_argument("--mini-batches", type=int, default=4, help="mini-batches, and so optimizer steps, of a step")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--without-trl", action="store_true", help="compare only our DisCO with our GRPO")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--side", choices=["grpo", "disco"], help="used by the benchmark itself")
    parser.add_argument("--model", type=Path, help="used by the benchmark itself")
    args = parser.parse_args()
    if args.side:
        serve_side(args)
        return
    results = {}
    for name, ends in (("spread", True), ("full", False)):
        results[name] = compare(args, ends=ends)
        print_result({"spread": "lengths that spread", "full": "all responses at the limit"}[name], results[name])
    sizes = {name: getattr(args, name) for name in (*SIZES, "hidden")}
    write_record(args.output, {"benchmark": "whole_step", "settings": sizes, "results": results})


if __name__ == "__main__":
    main()
