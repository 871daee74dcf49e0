"""DisCO (log-likelihood scores) against GRPO on the quickstart's task at 85M parameters: equal rollouts, equal steps.

    python benchmarks/gpu/learning.py [--output benchmarks/gpu/results/learning.json] [--steps 60] [--tiny]

Trains a random Qwen2 on worked solutions until Pass@1 is a third, or until its steps or time are used up (the warm
start), and then, by `nemo-disco train`, once with each objective, for some minutes on one GPU. The output is written
after the warm start and after each run. --tiny does all this on a CPU with a toy model; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tools.quickstart import make_assets, warm_start  # noqa: E402 - from the repository, not an installed package

ASSETS = ROOT / "assets" / "quickstart"
RECIPE = warm_start.Recipe(learning_rate=3e-4, check_from=40, stop_at=0.32)
TINY_RECIPE = replace(RECIPE, batch=4, check_from=2, check_every=2, stop_at=0.0, max_steps=2)
OBJECTIVES = {"disco": ["algorithm=disco", "algorithm.score=log_likelihood"], "grpo": ["algorithm=grpo"]}
CURVES = ("reward/mean", "policy/kl", "policy/entropy", "response/length_mean", "time/step", "throughput/mfu")
# Seconds: the warm start and two runs fit into a command of ten minutes.
RUN_LIMIT_S = 170
WARM_START_LIMIT_S = 150


def main() -> None:
    args = parse_arguments()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "settings": {name: value for name, value in vars(args).items() if name != "output"},
    }
    with tempfile.TemporaryDirectory() as work:
        result |= make_model(Path(work) / "model", args.tiny)
        args.output.write_text(json.dumps(result, indent=1) + "\n")
        for name, overrides in OBJECTIVES.items():
            result[name] = run_training(Path(work), name, overrides, args)
            args.output.write_text(json.dumps(result, indent=1) + "\n")
            print(f"{name}: {result[name]['evaluations'] or result[name]['error']}", flush=True)
    print(f"written to {args.output}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "gpu" / "results" / "learning.json")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lr", type=float, default=3e-5, help="learning rate of both runs")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tiny", action="store_true")
    return parser.parse_args()


def make_model(directory: Path, tiny: bool) -> dict[str, Any]:
    """Write a warm-started model with the quickstart's tokenizer to `directory`.

    Returns its number of parameters, the seconds of the warm start, and the reason why that fell short, or None.
    """
    start = time.monotonic()
    recipe = TINY_RECIPE if tiny else RECIPE
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "model")
    tokenizer.save_pretrained(directory)  # before the warm start, which turns padding on: it would be saved too
    model = build_random_model(tokenizer, tiny)
    _, development, _, supervised = make_assets.splits(recipe)
    error = None
    try:
        with time_limit(WARM_START_LIMIT_S):
            warm_start.train(model, tokenizer, supervised, development[: 4 if tiny else None], recipe)
    except (RuntimeError, TimeoutError) as reason:  # accuracy not reached, or out of time: the model is kept as it is
        error = f"{type(reason).__name__}: {reason}"
        print(f"The warm start fell short: {error}. Both runs start from the model as it is.", flush=True)
    model.save_pretrained(directory)
    parameters = sum(p.numel() for p in model.parameters())
    return {"parameters": parameters, "warm_start_s": time.monotonic() - start, "warm_start_error": error}


@contextmanager
def time_limit(limit_s: int) -> Iterator[None]:
    """Context in which TimeoutError is raised after `limit_s` seconds."""

    def raise_timeout(*_: object) -> None:
        raise TimeoutError(f"not done after {limit_s} s")

    old_handler = signal.signal(signal.SIGALRM, raise_timeout)
    signal.alarm(limit_s)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old_handler)


def build_random_model(tokenizer: Any, tiny: bool) -> Qwen2ForCausalLM:
    """A Qwen2 of 85M parameters (`tiny`: a toy one) with random weights in float32, on the GPU if there is one."""
    torch.manual_seed(0)
    width, layers, heads, kv_heads = (64, 2, 4, 2) if tiny else (768, 12, 12, 4)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        initializer_range=width**-0.5,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(config).float().to("cuda" if torch.cuda.is_available() else "cpu")


def run_training(work: Path, name: str, overrides: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """Train with one objective. Returns the error or None, the seconds, and the curves up to the end or failure."""
    directory = work / name
    command = [sys.executable, "-m", "nemo_disco", "train", "--config-name", "quickstart", *overrides]
    command += [
        f"model.path={work / 'model'}",
        f"exp_manager.explicit_log_dir={directory}",
        f"trainer.max_steps={args.steps}",
        "trainer.devices=1",
        f"trainer.precision={'bf16' if torch.cuda.is_available() else '32'}",
        "model.token_budget=32768",
        f"model.optim.lr={args.lr}",
        "model.optim.sched.min_lr=0.0",
        f"evaluation.every_n_steps={max(1, args.steps // 6)}",
        f"seed={args.seed}",
        "exp_manager.checkpoint_every_n_steps=100000",
    ]
    if args.tiny:
        command += ["evaluation.max_questions=4", "evaluation.samples=2", "data.questions_per_step=4"]
        command += ["algorithm.mini_batch_questions=2", "generation.max_response_length=16"]
    start = time.monotonic()
    error = None
    try:
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=RUN_LIMIT_S)
        if process.returncode:
            error = process.stderr[-4000:]
    except subprocess.TimeoutExpired:
        error = f"not done after {RUN_LIMIT_S} s"
    return {"error": error, "seconds": time.monotonic() - start, **read_curves(directory)}


def read_curves(directory: Path) -> dict[str, Any]:
    """From a run's directory: for each metric of CURVES a list of its value at each step, and Pass@1 by step."""
    from nemo_disco.evaluation.result import read_evaluations

    file = directory / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    evaluations = {}
    for result in read_evaluations(directory / "evaluation") if lines else []:
        pass_at_1 = result.per_question()["pass@1"]
        evaluations[str(result.step)] = None if pass_at_1 is None else float(pass_at_1.mean())
    return {"curves": {name: [line.get(name) for line in lines] for name in CURVES}, "evaluations": evaluations}


if __name__ == "__main__":
    main()
