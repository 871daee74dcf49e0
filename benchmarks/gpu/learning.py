"""DisCO (log-likelihood scores) against GRPO on the quickstart's task at 85M parameters: equal rollouts, equal steps.

    python benchmarks/gpu/learning.py [--output benchmarks/gpu/results/learning.json] [--steps 60] [--tiny]

Warm-starts a random Qwen2 on worked solutions until Pass@1 is a third, or as far as its steps and time go, then trains
it by each objective with the product's own command, minutes each on one GPU. What there is is written after each part.
--tiny goes through all of it on a CPU with a toy model; its figures mean nothing.
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

from tools.quickstart import make_assets, warm_start  # noqa: E402 - the repository's own, not an installed package

ASSETS = ROOT / "assets" / "quickstart"
RECIPE = warm_start.Recipe(learning_rate=3e-4, check_from=40, stop_at=0.32)
TINY_RECIPE = replace(RECIPE, batch=4, check_from=2, check_every=2, stop_at=0.0, max_steps=2)
OBJECTIVES = {"disco": ["algorithm=disco", "algorithm.score=log_likelihood"], "grpo": ["algorithm=grpo"]}
CURVES = ("reward/mean", "policy/kl", "policy/entropy", "response/length_mean", "time/step", "throughput/mfu")
# Two runs, the warm start and what they print fit into one command of ten minutes.
RUN_LIMIT_S = 170
WARM_START_LIMIT_S = 150


def main() -> None:
    args = arguments()
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
            result[name] = learn(Path(work), name, overrides, args)
            args.output.write_text(json.dumps(result, indent=1) + "\n")
            print(f"{name}: {result[name]['evaluations'] or result[name]['error']}", flush=True)
    print(f"written to {args.output}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "gpu" / "results" / "learning.json")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lr", type=float, default=3e-5, help="of both")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tiny", action="store_true")
    return parser.parse_args()


def make_model(directory: Path, tiny: bool) -> dict[str, Any]:
    """A warm-started model with the quickstart's tokenizer; its size, and how long it took."""
    start = time.monotonic()
    recipe = TINY_RECIPE if tiny else RECIPE
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "model")
    tokenizer.save_pretrained(directory)  # now: the warm start's padding would be saved with it
    model = new_model(tokenizer, tiny)
    _, development, _, supervised = make_assets.splits(recipe)
    error = None
    try:
        with ended_after(WARM_START_LIMIT_S):
            warm_start.train(model, tokenizer, supervised, development[: 4 if tiny else None], recipe)
    except (RuntimeError, TimeoutError) as stopped:  # short of its accuracy, or late: what it has learnt is kept
        error = f"{type(stopped).__name__}: {stopped}"
        print(f"warm start: {error}; both runs start from what it has learnt", flush=True)
    model.save_pretrained(directory)
    parameters = sum(p.numel() for p in model.parameters())
    return {"parameters": parameters, "warm_start_s": time.monotonic() - start, "warm_start_error": error}


@contextmanager
def ended_after(limit_s: int) -> Iterator[None]:
    """Raises TimeoutError inside, after so long."""

    def late(*_: object) -> None:
        raise TimeoutError(f"not done after {limit_s} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(limit_s)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def new_model(tokenizer: Any, tiny: bool) -> Qwen2ForCausalLM:
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


def learn(work: Path, name: str, overrides: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """Train, and read the curves; what there is of them if it failed or ran out of time."""
    run = work / name
    command = [sys.executable, "-m", "nemo_disco", "train", "--config-name", "quickstart", *overrides]
    command += [
        f"model.path={work / 'model'}",
        f"exp_manager.explicit_log_dir={run}",
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
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=RUN_LIMIT_S)
        if done.returncode:
            error = done.stderr[-4000:]
    except subprocess.TimeoutExpired:
        error = f"not done after {RUN_LIMIT_S} s"
    return {"error": error, "seconds": time.monotonic() - start, **read_curves(run)}


def read_curves(run: Path) -> dict[str, Any]:
    """A list of values for each of CURVES, one a step, and Pass@1 on the test questions by step."""
    from nemo_disco.evaluation.result import read_evaluations

    file = run / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    evaluations = {}
    for result in read_evaluations(run / "evaluation") if lines else []:
        found = result.per_problem()["pass@1"]
        evaluations[str(result.step)] = None if found is None else float(found.mean())
    return {"curves": {name: [line.get(name) for line in lines] for name in CURVES}, "evaluations": evaluations}


if __name__ == "__main__":
    main()
