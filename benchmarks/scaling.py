"""The training part of one DisCO step at 1, 2 and 4 processes of one thread, cut by DP, TP or PP.

    OMP_NUM_THREADS=1 python benchmarks/scaling.py [--questions 8 --limit 256 --repeats 5] [--output FILE.json]

Each layout is a group of processes that waits for its turn, all on the same model, rollouts and token budget: old
log-probs, then for each mini-batch the scores (pass 1), the gradient and the optimizer. Wall-clock seconds.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import make_model, median, median_ratio, serve, take_turns, write_record
from ours import build_algorithm, settings
from train_step import GROUP, LONGEST_PROMPT, made_up_rollouts

from nemo_disco.algorithms.trainer import Trainer
from nemo_disco.data.packing import round_up
from nemo_disco.data.rollouts import Rollouts
from nemo_disco.policy.micro_batch import sequence_lengths
from nemo_disco.runtime.timing import record_spans

KEYS = {"DP": "", "TP": "model.tensor_model_parallel_size", "PP": "model.pipeline_model_parallel_size"}
LAYOUTS = ["DP 1", *(f"{kind} {size}" for size in (2, 4) for kind in KEYS)]


# --- a layout's processes ---


class Waiting:
    """Seconds in which this process waits for a collective, a message or a peer: what is not hidden by computing."""

    def __init__(self) -> None:
        self.seconds = 0.0
        wait = dist.Work.wait

        def timed(work: Any, *args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return wait(work, *args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        dist.Work.wait = timed  # type: ignore[method-assign]


def rank(args: argparse.Namespace) -> None:
    """One process of a layout: rank 0 takes the turns and tells the others."""
    kind, size = args.side.split()
    world_size = int(size)
    dist.init_process_group("gloo", init_method=f"file://{args.meeting}", rank=args.rank, world_size=world_size)
    rollouts = made_up_rollouts(args.questions, args.limit)
    algorithm = build(args, [f"{KEYS[kind]}={size}"] if KEYS[kind] else [])
    waiting = Waiting()

    def step() -> dict[str, float]:
        return one_step(algorithm, rollouts, waiting, args)

    def told(go: bool = False) -> bool:
        order = torch.tensor(int(go))
        dist.broadcast(order, src=0)
        return bool(order)

    if args.rank == 0:
        serve(lambda: step() if told(True) else {})
        told(False)
    else:
        while told():
            step()
    dist.destroy_process_group()


def build(args: argparse.Namespace, layout: list[str]) -> Trainer:
    return build_algorithm(
        settings(
            args.model,
            [
                f"data.questions_per_step={args.questions}",
                f"algorithm.mini_batch_questions={args.questions // args.mini_batches}",
                f"generation.max_response_length={args.limit}",
                f"model.token_budget={2 * (args.limit + LONGEST_PROMPT)}",
                "model.optim.lr=1e-5",
                *layout,
            ],
        )
    )


def one_step(algorithm: Trainer, rollouts: Rollouts, waiting: Waiting, args: argparse.Namespace) -> dict[str, float]:
    """Figures of a step: wall-clock seconds, processor seconds of all ranks, their mean share of waiting, the packing
    of the mini-batches."""
    dist.barrier()
    start, busy, waited = time.perf_counter(), processor_seconds(), waiting.seconds
    with record_spans() as spans:  # log_probs includes pass 1
        norm = algorithm.run_training(rollouts)["grad_norm"]
    dist.barrier()
    seconds = time.perf_counter() - start
    sums = torch.tensor([processor_seconds() - busy, (waiting.seconds - waited) / seconds], dtype=torch.float64)
    dist.all_reduce(sums)
    training = spans["log_probs"] + spans["train"]
    return {
        "step_seconds": seconds,
        "processor_seconds_of_all": float(sums[0]),
        "cores_busy": float(sums[0]) / seconds,
        "communication_share": float(sums[1]) / dist.get_world_size(),
        "pass1_share": spans["pass1"] / training,
        "two_passes_of_one": training / (training - spans["pass1"]),
        "grad_norm": norm,
        **packing(algorithm, rollouts, args),
    }


def packing(algorithm: Trainer, rollouts: Rollouts, args: argparse.Namespace) -> dict[str, float]:
    """The least fill over the mini-batches, also as a share of what arithmetic allows, and their micro-batches."""
    fills, shares, counts = [], [], []
    for first in range(0, len(rollouts), len(rollouts) // args.mini_batches):
        part = rollouts.select(range(first, first + len(rollouts) // args.mini_batches))
        plan, tokens = algorithm.policy.plan(part), sum(sequence_lengths(part))
        budget = algorithm.policy.config.token_budget
        fills.append(tokens / (len(plan) * len(plan[0]) * budget))
        shares.append(fills[-1] / (tokens / round_up(tokens, len(plan) * budget)))
        counts.append(len(plan[0]))
    return {"fill": min(fills), "fill_of_possible": min(shares), "micro_batches": max(counts)}


def processor_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def group(args: argparse.Namespace) -> None:
    """Rank 0 of a layout, and the start of the others."""
    args.rank, args.meeting = 0, Path(tempfile.mkdtemp(dir=args.model)) / "meeting"
    command = [sys.executable, *sys.argv, "--meeting", str(args.meeting), "--rank"]
    others = [
        subprocess.Popen([*command, str(i)], stdin=subprocess.DEVNULL, stdout=sys.stderr)
        for i in range(1, int(args.side.split()[1]))
    ]
    rank(args)
    for other in others:
        other.wait()


# --- the benchmark ---


def report(args: argparse.Namespace, runs: Mapping[str, list[dict[str, float]]]) -> None:
    norms = [turns[0]["grad_norm"] for turns in runs.values()]
    if max(norms) / min(norms) > 1.01:
        raise SystemExit(f"the layouts do not compute the same: mean gradient norms {norms}")
    one, cores = runs["DP 1"], os.cpu_count() or 1
    names = ["step_seconds", "cores_busy", "communication_share", "pass1_share", "two_passes_of_one"]
    names += ["fill", "fill_of_possible", "micro_batches"]
    result = {}
    for layout, turns in runs.items():
        result[layout] = {name: median(turns, name) for name in names} | {
            "speedup": median_ratio(one, turns, "step_seconds"),
            "work_of_one_process": median_ratio(turns, one, "processor_seconds_of_all"),
        }
    print(
        f"{'':6}{'s a step':>10}{'speed-up':>10}{'cores':>7}{'work':>6}{'waiting':>9}{'pass 1':>8}{'2/1':>6}{'fill':>7}"
    )
    for layout, r in result.items():
        print(
            f"{layout:6}{r['step_seconds']:10.2f}{r['speedup']:10.2f}{r['cores_busy']:7.2f}"
            f"{r['work_of_one_process']:6.2f}{r['communication_share']:9.0%}{r['pass1_share']:8.1%}"
            f"{r['two_passes_of_one']:6.2f}{r['fill']:7.2f}"
        )
    note = f"{cores} cores: no layout can be faster than {cores} times one process, and 4 processes share them"
    if (alone := median(one, "cores_busy")) < 0.9:
        note += f"; others worked here too: one process got {alone:.2f} of a core: trust the work, not the seconds"
    print(note)
    sizes = {name: value for name, value in vars(args).items() if isinstance(value, int)}
    write_record(args.output, {"benchmark": "scaling", "settings": sizes, "note": note, "result": result, "runs": runs})


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=8, help=f"each with {GROUP} responses")
    parser.add_argument("--limit", type=int, default=256, help="the longest response; the mean is a third of it")
    parser.add_argument("--mini-batches", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layouts", nargs="+", default=LAYOUTS, metavar="KIND_N", help=", ".join(LAYOUTS))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--side", help="used by the benchmark itself")
    parser.add_argument("--model", type=Path, help="used by the benchmark itself")
    parser.add_argument("--meeting", type=Path, help="used by the benchmark itself")
    parser.add_argument("--rank", type=int, help="used by the benchmark itself")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.rank is not None:
        rank(args)
        return
    if args.side:
        group(args)
        return
    with tempfile.TemporaryDirectory() as work:
        model = make_model(Path(work), args.limit, ends=True, hidden=args.hidden)
        command = [sys.executable, *sys.argv, "--model", str(model), "--side"]
        runs = take_turns({layout: [*command, layout] for layout in args.layouts}, args.repeats, pinned=False)
    report(args, runs)


if __name__ == "__main__":
    main()
