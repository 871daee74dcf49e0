"""Speed of the training part of one DisCO step in 1, 2 and 4 processes of one thread, by DP, TP or PP.

    OMP_NUM_THREADS=1 python benchmarks/scaling.py [--questions 8 --limit 256 --repeats 5] [--output FILE.json]

Each layout is a side: a group of processes that work together in their turn and are not pinned to a core. All have the
same model, rollouts and token budget. One turn computes the old log-probs and then, for each mini-batch, the scores
(pass 1), the gradient and the optimizer's step. Times are wall-clock seconds unless they say otherwise.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from benchmark_trainer import build_benchmark_trainer, compose_config
from common import TurnsBySide, make_model, median, median_ratio, serve, take_turns, write_record
from train_step import GROUP, LONGEST_PROMPT, make_random_rollouts

from nemo_disco.algorithms.trainer import Trainer
from nemo_disco.data.packing import round_up
from nemo_disco.data.rollouts import Rollouts
from nemo_disco.policy.micro_batch import sequence_lengths
from nemo_disco.runtime.spans import record_spans

SETTINGS = {"DP": "", "TP": "model.tensor_model_parallel_size", "PP": "model.pipeline_model_parallel_size"}
LAYOUTS = ["DP 1", *(f"{kind} {size}" for size in (2, 4) for kind in SETTINGS)]


# --- a layout's processes ---


class WaitTimer:
    """Sum of the seconds that this process waits for communication, that is, in torch.distributed's Work.wait.

    Creating it replaces Work.wait for the whole process. Communication that computing hides is not counted.
    """

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


def run_rank(args: argparse.Namespace) -> None:
    """Work as one rank of the layout `args.side` until there are no more turns; rank 0 announces each to the others."""
    kind, size = args.side.split()
    world_size = int(size)
    dist.init_process_group("gloo", init_method=f"file://{args.meeting}", rank=args.rank, world_size=world_size)
    rollouts = make_random_rollouts(args.questions, args.limit)
    trainer = build_trainer(args, [f"{SETTINGS[kind]}={size}"] if SETTINGS[kind] else [])
    wait_timer = WaitTimer()

    def step() -> dict[str, float]:
        return measure_step(trainer, rollouts, wait_timer, args)

    def broadcast_has_turn(has_turn: bool = False) -> bool:
        """Rank 0's answer on every rank; the argument of the other ranks does not count."""
        answer = torch.tensor(int(has_turn))
        dist.broadcast(answer, src=0)
        return bool(answer)

    if args.rank == 0:
        serve(lambda: step() if broadcast_has_turn(True) else {})
        broadcast_has_turn(False)
    else:
        while broadcast_has_turn():
            step()
    dist.destroy_process_group()


def build_trainer(args: argparse.Namespace, layout: list[str]) -> Trainer:
    """The trainer of this rank. layout: overrides that set the parallelism."""
    return build_benchmark_trainer(
        compose_config(
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


def measure_step(
    trainer: Trainer, rollouts: Rollouts, wait_timer: WaitTimer, args: argparse.Namespace
) -> dict[str, float]:
    """Train one step on all ranks and return its figures.

    step_seconds: wall-clock seconds until the last rank is done. processor_seconds_of_all: the sum over ranks.
    communication_share: the share of the step that a rank waits, as the mean over ranks. two_passes_of_one: the time of
    the training part divided by its time without pass 1. The rest is from measure_packing.
    """
    dist.barrier()
    start, start_processor, start_wait = time.perf_counter(), processor_seconds(), wait_timer.seconds
    with record_spans() as spans:  # the span log_probs includes pass 1
        norm = trainer.run_training(rollouts)["grad_norm"]
    dist.barrier()
    seconds = time.perf_counter() - start
    processor = processor_seconds() - start_processor
    sums = torch.tensor([processor, (wait_timer.seconds - start_wait) / seconds], dtype=torch.float64)
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
        **measure_packing(trainer, rollouts, args),
    }


def measure_packing(trainer: Trainer, rollouts: Rollouts, args: argparse.Namespace) -> dict[str, float]:
    """Figures of the packing plans of the step's mini-batches.

    fill: tokens divided by the token budgets of all micro-batches, in the worst mini-batch. fill_of_possible: the same
    as a share of the fill with the fewest micro-batches that could hold the tokens (as many on every rank).
    micro_batches: the number on each rank, in the mini-batch that has most.
    """
    fills, shares, counts = [], [], []
    for first in range(0, len(rollouts), len(rollouts) // args.mini_batches):
        part = rollouts.select(range(first, first + len(rollouts) // args.mini_batches))
        plan, tokens = trainer.policy.plan(part), sum(sequence_lengths(part))
        budget = trainer.policy.config.token_budget
        fills.append(tokens / (len(plan) * len(plan[0]) * budget))
        shares.append(fills[-1] / (tokens / round_up(tokens, len(plan) * budget)))
        counts.append(len(plan[0]))
    return {"fill": min(fills), "fill_of_possible": min(shares), "micro_batches": max(counts)}


def processor_seconds() -> float:
    """Processor time of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def run_layout(args: argparse.Namespace) -> None:
    """Start the other ranks of the layout `args.side` as child processes, and work as its rank 0."""
    args.rank, args.meeting = 0, Path(tempfile.mkdtemp(dir=args.model)) / "meeting"
    command = [sys.executable, *sys.argv, "--meeting", str(args.meeting), "--rank"]
    others = [
        subprocess.Popen([*command, str(i)], stdin=subprocess.DEVNULL, stdout=sys.stderr)
        for i in range(1, int(args.side.split()[1]))
    ]
    run_rank(args)
    for other in others:
        other.wait()


# --- the benchmark ---


def report(args: argparse.Namespace, turns_by_layout: TurnsBySide) -> None:
    """Print the results and write the record. Raises SystemExit if the layouts' gradients differ by over 1%."""
    norms = [turns[0]["grad_norm"] for turns in turns_by_layout.values()]
    if max(norms) / min(norms) > 1.01:
        raise SystemExit(f"the layouts do not compute the same gradient: the mean gradient norms are {norms}")
    one_process, cores = turns_by_layout["DP 1"], os.cpu_count() or 1
    names = ["step_seconds", "cores_busy", "communication_share", "pass1_share", "two_passes_of_one"]
    names += ["fill", "fill_of_possible", "micro_batches"]
    result = {}
    for layout, turns in turns_by_layout.items():
        result[layout] = {name: median(turns, name) for name in names} | {
            "speedup": median_ratio(one_process, turns, "step_seconds"),
            "work_of_one_process": median_ratio(turns, one_process, "processor_seconds_of_all"),
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
    if (share := median(one_process, "cores_busy")) < 0.9:
        note += f"; other programs used the machine too (a single process got {share:.2f} of a core), so rely on the"
        note += " column `work` (processor seconds, times one process) and not on the seconds"
    print(note)
    sizes = {name: value for name, value in vars(args).items() if isinstance(value, int)}
    record = {"benchmark": "scaling", "settings": sizes, "note": note, "result": result, "runs": turns_by_layout}
    write_record(args.output, record)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=8, help=f"questions of a step, each with {GROUP} responses")
    parser.add_argument("--limit", type=int, default=256, help="the most tokens of a response; the mean is a third")
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
    args = parse_arguments()
    if args.rank is not None:
        run_rank(args)
        return
    if args.side:
        run_layout(args)
        return
    with tempfile.TemporaryDirectory() as work:
        model = make_model(Path(work), args.limit, ends=True, hidden=args.hidden)
        command = [sys.executable, *sys.argv, "--model", str(model), "--side"]
        commands = {layout: [*command, layout] for layout in args.layouts}
        turns_by_layout = take_turns(commands, args.repeats, pinned=False)
    report(args, turns_by_layout)


if __name__ == "__main__":
    main()
