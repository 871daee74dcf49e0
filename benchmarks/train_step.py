"""The training part of one DisCO step: this project, which packs, against plain transformers and PyTorch, which pad.

    OMP_NUM_THREADS=1 python benchmarks/train_step.py [--limit 512 --repeats 5] [--output FILE.json]

One turn computes the old log-probs and then, for each mini-batch, the scores (pass 1), the gradient (pass 2) and the
optimizer's step. Both sides, `ours` and `padded`, have the same model, rollouts, objective, forward passes, number of
micro-batches, AdamW, clipping, and PyTorch's sdpa attention in float32. The padded side pads each micro-batch to the
longest sequence in it.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from benchmark_trainer import build_benchmark_trainer, compose_config
from common import (
    VOCABULARY,
    TurnsBySide,
    make_model,
    make_prompts,
    median,
    median_ratio,
    serve,
    take_turns,
    write_record,
)
from torch import Tensor

from nemo_disco.algorithms import MiniBatch, build_objective
from nemo_disco.data.rollouts import Rollouts
from nemo_disco.runtime.spans import record_spans

GROUP, LEARNING_RATE, CLIP, TEMPERATURE = 8, 1e-5, 1.0, 1.0
LONGEST_PROMPT = 64


def make_random_rollouts(questions: int, limit: int, seed: int = 0) -> Rollouts:
    """Rollouts of random tokens, GROUP for each question, of which about half are right.

    Response lengths are exponential with the mean limit / 3; a length above `limit` is drawn again.
    """
    draw = random.Random(seed)

    def draw_length() -> int:
        # An exponential of mean 0.4636 has mean 1/3 if values above 1 are drawn again.
        while (x := draw.expovariate(1.0) * 0.4636) > 1:
            pass
        return max(1, round(x * limit))

    prompts = [p for p in make_prompts(questions, longest=LONGEST_PROMPT) for _ in range(GROUP)]
    responses = [[draw.randrange(2, VOCABULARY) for _ in range(draw_length())] for _ in prompts]
    rollouts = Rollouts.pack(
        prompts,
        responses,
        [[0.0] * len(r) for r in responses],
        [i // GROUP for i in range(len(prompts))],
        [False] * len(prompts),
    )
    return rollouts.with_rewards([float(draw.random() < 0.5) for _ in prompts])


class PaddedTrainer:
    """The same training step, written in the usual way with transformers and PyTorch: micro-batches are padded."""

    def __init__(self, model: Path, args: argparse.Namespace) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa")
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
        self.objective = build_objective({"name": "disco"})
        self.args = args

    def compute_micro_batch_log_probs(self, rollouts: Rollouts, rows: range) -> Tensor:
        """Log-probs [t] of the response tokens of the rollouts `rows`, which form one micro-batch."""
        sequences = [torch.cat([rollouts.prompt(i), rollouts.response(i)]) for i in rows]
        ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=1)
        mask = torch.arange(ids.shape[1]) < torch.tensor([len(s) for s in sequences])[:, None]
        logits = self.model(ids, attention_mask=mask, use_cache=False).logits[:, :-1] / TEMPERATURE
        log_probs = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        starts = rollouts.prompt_lengths[rows.start : rows.stop, None] - 1
        position = torch.arange(ids.shape[1] - 1)
        return log_probs[(position >= starts) & mask[:, 1:]]

    def split_into_micro_batches(self, rollouts: Rollouts) -> list[range]:
        size, n = self.args.micro_batch, len(rollouts)
        return [range(i, min(i + size, n)) for i in range(0, n, size)]

    @torch.no_grad()
    def compute_log_probs(self, rollouts: Rollouts) -> Tensor:
        """Log-probs [T] of all response tokens, without a gradient."""
        micro_batches = self.split_into_micro_batches(rollouts)
        return torch.cat([self.compute_micro_batch_log_probs(rollouts, rows) for rows in micro_batches])

    def step(self, rollouts: Rollouts) -> Mapping[str, float]:
        """Train on every mini-batch once; returns the mean gradient norm before clipping, as `grad_norm`."""
        old_log_probs = self.compute_log_probs(rollouts)
        norms = []
        size = len(rollouts) // self.args.mini_batches
        for first in range(0, len(rollouts), size):
            responses = range(first, first + size)
            part, part_old = rollouts.select(responses), old_log_probs[rollouts.token_index(responses)]
            # Pass 1. Before the first update it would give the old log-probs again.
            log_probs = part_old if first == 0 else self.compute_log_probs(part)
            weights = self.objective(
                MiniBatch(
                    log_probs=log_probs,
                    old_log_probs=part_old,
                    lengths=part.response_lengths,
                    question_ids=part.question_ids,
                    rewards=part.rewards,
                    max_response_length=self.args.limit,
                )
            ).token_weights.float()
            self.optimizer.zero_grad()
            for rows in self.split_into_micro_batches(part):
                (weights[part.token_index(rows)] * self.compute_micro_batch_log_probs(part, rows)).sum().backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)))
            self.optimizer.step()
        return {"grad_norm": sum(norms) / len(norms)}


def choose_token_budget(rollouts: Rollouts, args: argparse.Namespace) -> int:
    """The token budget at which the fullest mini-batch is packed into as many micro-batches as the padded side has.

    3% of a micro-batch may stay free, since packing cannot fill it exactly.
    """
    mini_batches = rollouts.total_lengths.view(args.mini_batches, -1)
    count = -(-mini_batches.shape[1] // args.micro_batch)
    return max(int(1.03 * mini_batches.sum(1).max() / count), int(rollouts.total_lengths.max()))


def serve_side(args: argparse.Namespace) -> None:
    """Take the turns of the side `args.side`: one training step each, on the same rollouts."""
    torch.set_num_threads(1)
    rollouts = make_random_rollouts(args.questions, args.limit)
    if args.side == "padded":
        padded_trainer = PaddedTrainer(args.model, args)
        serve(lambda: padded_trainer.step(rollouts))
        return
    config = compose_config(
        args.model,
        [
            f"data.questions_per_step={args.questions}",
            f"algorithm.mini_batch_questions={args.questions // args.mini_batches}",
            f"generation.max_response_length={args.limit}",
            f"model.token_budget={choose_token_budget(rollouts, args)}",
            f"trainer.gradient_clip_val={CLIP}",
            f"model.optim.lr={LEARNING_RATE}",
        ],
    )
    trainer = build_benchmark_trainer(config)

    def step() -> dict[str, float]:
        with record_spans() as spans:  # the span log_probs includes pass 1
            metrics = trainer.run_training(rollouts)
        return {
            "grad_norm": metrics["grad_norm"],
            "pass1_share": spans["pass1"] / (spans["log_probs"] + spans["train"]),
        }

    serve(step)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=16, help=f"questions of a step, each with {GROUP} responses")
    parser.add_argument("--limit", type=int, default=512, help="the most tokens of a response; the mean is a third")
    parser.add_argument("--mini-batches", type=int, default=4)
    parser.add_argument("--micro-batch", type=int, default=8, help="responses in the padded side's micro-batch")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--side", choices=["ours", "padded"], help="used by the benchmark itself")
    parser.add_argument("--model", type=Path, help="used by the benchmark itself")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if args.side:
        serve_side(args)
        return
    with tempfile.TemporaryDirectory() as work:
        model = make_model(Path(work), args.limit, ends=True, hidden=args.hidden)
        command = [sys.executable, *sys.argv, "--model", str(model), "--side"]
        turns_by_side = take_turns({side: [*command, side] for side in ("ours", "padded")}, args.repeats)
    report(args, turns_by_side)


def report(args: argparse.Namespace, turns_by_side: TurnsBySide) -> None:
    """Print the results and write the record. Raises SystemExit if the two sides' gradients differ by over 1%."""
    packed, padded = turns_by_side["ours"], turns_by_side["padded"]
    if abs(packed[0]["grad_norm"] / padded[0]["grad_norm"] - 1) > 1e-2:
        norms = f"{packed[0]['grad_norm']:.6g} (ours) and {padded[0]['grad_norm']:.6g} (padded)"
        raise SystemExit(f"the sides do not compute the same gradient: the mean gradient norms are {norms}")
    rollouts = make_random_rollouts(args.questions, args.limit)
    tokens = int(rollouts.total_lengths.sum())
    lengths = rollouts.response_lengths.double()
    result = {
        "tokens": tokens,
        "mean_length_of_limit": float(lengths.mean()) / args.limit,
        "tokens_per_second": {side: tokens / median(turns, "seconds") for side, turns in turns_by_side.items()},
        "speedup": median_ratio(padded, packed, "seconds"),
        "speedup_by_the_wall_clock": median_ratio(padded, packed, "wall_seconds"),
        "peak_mb": {side: turns[-1]["peak_mb"] for side, turns in turns_by_side.items()},
        "added_mb": {side: turns[-1]["added_mb"] for side, turns in turns_by_side.items()},
        "pass1_share": median(packed, "pass1_share"),
    }
    print(f"{len(rollouts)} responses of {lengths.mean():.0f} tokens in the mean and {args.limit} at most", end="; ")
    print(f"{tokens} tokens with the prompts")
    print(f"{'':8}{'tokens/s':>10}{'peak MB':>10}{'added MB':>10}")
    for side in turns_by_side:
        memory = f"{result['peak_mb'][side]:10.0f}{result['added_mb'][side]:10.0f}"  # type: ignore[index]
        print(f"{side:8}{result['tokens_per_second'][side]:10.0f}{memory}")  # type: ignore[index]
    wall = f"({result['speedup_by_the_wall_clock']:.2f} by the wall clock)"
    print(f"the packing side (ours) is {result['speedup']:.2f} times as fast as the padded one {wall}")
    print(f"pass 1 takes {100 * median(packed, 'pass1_share'):.1f}% of the packing side's time")
    sizes = {name: value for name, value in vars(args).items() if isinstance(value, int)}
    write_record(args.output, {"benchmark": "train_step", "settings": sizes, "result": result, "runs": turns_by_side})


if __name__ == "__main__":
    main()
