"""The training part of one DisCO step, ours against plain transformers and PyTorch, which pads.

    OMP_NUM_THREADS=1 python benchmarks/train_step.py [--limit 512 --repeats 5] [--output FILE.json]

Old log-probs, then for each mini-batch the scores (pass 1), the gradient (pass 2) and the optimizer. On both sides the
same model, rollouts, objective, forward passes, number of micro-batches, AdamW and clipping; sdpa in float32.
The padded side pads each micro-batch to its own longest sequence.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from common import VOCABULARY, make_model, median, median_ratio, prompts, serve, take_turns, write_record
from ours import build_algorithm, settings
from torch import Tensor

from nemo_disco.algorithms import MiniBatch, build_objective
from nemo_disco.data.rollouts import Rollouts
from nemo_disco.runtime.timing import record_spans

GROUP, LEARNING_RATE, CLIP, TEMPERATURE = 8, 1e-5, 1.0, 1.0
LONGEST_PROMPT = 64


def made_up_rollouts(questions: int, limit: int, seed: int = 0) -> Rollouts:
    """Responses of exponential length, redrawn above `limit`, such that the mean is a third of it."""
    draw = random.Random(seed)

    def length() -> int:
        # An exponential of this mean, cut at 1, has mean 1/3.
        while (x := draw.expovariate(1.0) * 0.4636) > 1:
            pass
        return max(1, round(x * limit))

    asked = [p for p in prompts(questions, longest=LONGEST_PROMPT) for _ in range(GROUP)]
    responses = [[draw.randrange(2, VOCABULARY) for _ in range(length())] for _ in asked]
    rollouts = Rollouts.pack(
        asked,
        responses,
        [[0.0] * len(r) for r in responses],
        [i // GROUP for i in range(len(asked))],
        [False] * len(asked),
    )
    return rollouts.with_rewards([float(draw.random() < 0.5) for _ in asked])


class Padded:
    """A training step as one writes it with plain transformers."""

    def __init__(self, model: Path, args: argparse.Namespace) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa")
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
        self.objective = build_objective({"name": "disco"})
        self.args = args

    def log_probs(self, rollouts: Rollouts, rows: range) -> Tensor:
        """[t] of the response tokens of some rows, which run together."""
        sequences = [torch.cat([rollouts.prompt(i), rollouts.response(i)]) for i in rows]
        ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=1)
        mask = torch.arange(ids.shape[1]) < torch.tensor([len(s) for s in sequences])[:, None]
        logits = self.model(ids, attention_mask=mask, use_cache=False).logits[:, :-1] / TEMPERATURE
        log_probs = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        starts = rollouts.prompt_lengths[rows.start : rows.stop, None] - 1
        position = torch.arange(ids.shape[1] - 1)
        return log_probs[(position >= starts) & mask[:, 1:]]

    def micro_batches(self, rollouts: Rollouts) -> list[range]:
        size, n = self.args.micro_batch, len(rollouts)
        return [range(i, min(i + size, n)) for i in range(0, n, size)]

    @torch.no_grad()
    def scores(self, rollouts: Rollouts) -> Tensor:
        return torch.cat([self.log_probs(rollouts, rows) for rows in self.micro_batches(rollouts)])

    def step(self, rollouts: Rollouts) -> Mapping[str, float]:
        old = self.scores(rollouts)
        norms = []
        size = len(rollouts) // self.args.mini_batches
        for first in range(0, len(rollouts), size):
            responses = range(first, first + size)
            part, part_old = rollouts.select(responses), old[rollouts.token_index(responses)]
            scores = part_old if first == 0 else self.scores(part)
            weights = self.objective(
                MiniBatch(
                    log_probs=scores,
                    old_log_probs=part_old,
                    lengths=part.response_lengths,
                    question_ids=part.question_ids,
                    rewards=part.rewards,
                    max_response_length=self.args.limit,
                )
            ).token_weights.float()
            self.optimizer.zero_grad()
            for rows in self.micro_batches(part):
                (weights[part.token_index(rows)] * self.log_probs(part, rows)).sum().backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)))
            self.optimizer.step()
        return {"grad_norm": sum(norms) / len(norms)}


def token_budget(rollouts: Rollouts, args: argparse.Namespace) -> int:
    """With which the fullest mini-batch takes as many micro-batches as on the padded side; packing leaves 3% free."""
    mini_batches = rollouts.total_lengths.view(args.mini_batches, -1)
    count = -(-mini_batches.shape[1] // args.micro_batch)
    return max(int(1.03 * mini_batches.sum(1).max() / count), int(rollouts.total_lengths.max()))


def serve_side(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    rollouts = made_up_rollouts(args.questions, args.limit)
    if args.side == "padded":
        padded = Padded(args.model, args)
        serve(lambda: padded.step(rollouts))
        return
    config = settings(
        args.model,
        [
            f"data.questions_per_step={args.questions}",
            f"algorithm.mini_batch_questions={args.questions // args.mini_batches}",
            f"generation.max_response_length={args.limit}",
            f"model.token_budget={token_budget(rollouts, args)}",
            f"trainer.gradient_clip_val={CLIP}",
            f"model.optim.lr={LEARNING_RATE}",
        ],
    )
    algorithm = build_algorithm(config)

    def step() -> dict[str, float]:
        with record_spans() as spans:  # log_probs includes pass 1
            metrics = algorithm.run_training(rollouts)
        return {
            "grad_norm": metrics["grad_norm"],
            "pass1_share": spans["pass1"] / (spans["log_probs"] + spans["train"]),
        }

    serve(step)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=16, help=f"each with {GROUP} responses")
    parser.add_argument("--limit", type=int, default=512, help="the longest response; the mean is a third of it")
    parser.add_argument("--mini-batches", type=int, default=4)
    parser.add_argument("--micro-batch", type=int, default=8, help="responses in the padded side's micro-batch")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--side", choices=["ours", "padded"], help="used by the benchmark itself")
    parser.add_argument("--model", type=Path, help="used by the benchmark itself")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.side:
        serve_side(args)
        return
    with tempfile.TemporaryDirectory() as work:
        model = make_model(Path(work), args.limit, ends=True, hidden=args.hidden)
        command = [sys.executable, *sys.argv, "--model", str(model), "--side"]
        runs = take_turns({side: [*command, side] for side in ("ours", "padded")}, args.repeats)
    report(args, runs)


def report(args: argparse.Namespace, runs: dict[str, list[dict[str, float]]]) -> None:
    ours, padded = runs["ours"], runs["padded"]
    if abs(ours[0]["grad_norm"] / padded[0]["grad_norm"] - 1) > 1e-2:
        norms = f"{ours[0]['grad_norm']:.6g} and {padded[0]['grad_norm']:.6g}"
        raise SystemExit(f"the sides do not compute the same: mean gradient norms {norms}")
    rollouts = made_up_rollouts(args.questions, args.limit)
    tokens = int(rollouts.total_lengths.sum())
    lengths = rollouts.response_lengths.double()
    result = {
        "tokens": tokens,
        "mean_length_of_limit": float(lengths.mean()) / args.limit,
        "tokens_per_second": {side: tokens / median(turns, "seconds") for side, turns in runs.items()},
        "speedup": median_ratio(padded, ours, "seconds"),
        "speedup_by_the_wall_clock": median_ratio(padded, ours, "wall_seconds"),
        "peak_mb": {side: turns[-1]["peak_mb"] for side, turns in runs.items()},
        "added_mb": {side: turns[-1]["added_mb"] for side, turns in runs.items()},
        "pass1_share": median(ours, "pass1_share"),
    }
    print(f"{len(rollouts)} responses, {tokens} tokens, responses of {lengths.mean():.0f} tokens of {args.limit}")
    print(f"{'':8}{'tokens/s':>10}{'peak MB':>10}{'added MB':>10}")
    for side in runs:
        memory = f"{result['peak_mb'][side]:10.0f}{result['added_mb'][side]:10.0f}"  # type: ignore[index]
        print(f"{side:8}{result['tokens_per_second'][side]:10.0f}{memory}")  # type: ignore[index]
    wall = f"({result['speedup_by_the_wall_clock']:.2f} by the wall clock)"
    print(f"ours is {result['speedup']:.2f} times as fast {wall}")
    print(f"pass 1 is {100 * median(ours, 'pass1_share'):.1f}% of the training part")
    sizes = {name: value for name, value in vars(args).items() if isinstance(value, int)}
    write_record(args.output, {"benchmark": "train_step", "settings": sizes, "result": result, "runs": runs})


if __name__ == "__main__":
    main()
