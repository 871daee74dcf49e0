"""Training time lost to a checkpoint: one that training waits for, against one that is written in the background.

The two kinds of save alternate in the same processes, on 200 MB of weights and optimizer state: first in one process,
then in two data-parallel ones, with one thread each. Every measurement begins at a barrier and counts the slowest rank.
Beside a background save training goes on until the checkpoint is complete; its steps are compared with undisturbed
ones. Training still waits for the snapshot, and in the next step its optimizer waits until the writer has read the
weights. (In a real run that step samples responses first, so that its optimizer waits less.)
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import make_model, write_record
from train_step import make_random_rollouts

from nemo_disco.checkpoint.writer import CheckpointWriter
from nemo_disco.config.compose import compose
from nemo_disco.data.rollouts import Rollouts
from nemo_disco.policy import parallel
from nemo_disco.policy.policy import Policy

QUIET_STEPS = 2  # training steps without a save beside them, measured in each turn


def time_slowest_rank(work: Callable[[], object]) -> float:
    """Wall-clock seconds that `work` takes on the slowest rank, when all ranks begin it together."""
    dist.barrier()
    start = time.perf_counter()
    work()
    seconds = torch.tensor(time.perf_counter() - start)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return float(seconds)


def is_true_on_all_ranks(flag: bool) -> bool:
    votes = torch.tensor(int(flag))
    dist.all_reduce(votes, op=dist.ReduceOp.MIN)
    return bool(votes)


def train_one_step(policy: Policy, rollouts: Rollouts) -> None:
    """One gradient step on all rollouts, with the mean log-prob as the loss."""
    total = int(rollouts.response_lengths.sum())
    policy.accumulate(rollouts, lambda _, values: values.log_probs / total)
    policy.step()


def time_step_after_snapshot(policy: Policy, rollouts: Rollouts) -> tuple[float, float]:
    """Train one step while a save is being written.

    Returns the seconds that its optimizer waits until the writer has read the weights, and the seconds of all else.
    """
    assert policy.optimizer is not None
    total = int(rollouts.response_lengths.sum())
    gradient = time_slowest_rank(lambda: policy.accumulate(rollouts, lambda _, values: values.log_probs / total))
    wait = time_slowest_rank(policy.optimizer.weights_read.wait)
    return wait, gradient + time_slowest_rank(policy.step)


def measure_saves(policy: Policy, rollouts: Rollouts, directory: Path, number: int) -> dict[str, float]:
    """Seconds of one save of each kind and of the training steps around them: one turn of the benchmark.

    synchronous: the save that training waits for. blocked: all that training waits because of the background save;
    optimizer_waited: the part of it in the optimizer. complete_after: from the start of the background save until it is
    complete on all ranks. quiet_step, step_beside: a training step without and beside a save; steps_beside: the
    number of the latter.
    """
    with CheckpointWriter() as writer:

        def save() -> None:
            writer.save(policy, directory, number, {}, keep=1)

        def save_and_wait() -> None:
            save()
            writer.wait()

        synchronous = time_slowest_rank(save_and_wait)
        quiet_steps = [time_slowest_rank(lambda: train_one_step(policy, rollouts)) for _ in range(QUIET_STEPS)]
        start = time.perf_counter()
        snapshot = time_slowest_rank(save)
        optimizer_wait, first_step = time_step_after_snapshot(policy, rollouts)
        steps_beside = [first_step]
        while not is_true_on_all_ranks(writer.done):
            steps_beside.append(time_slowest_rank(lambda: train_one_step(policy, rollouts)))
        complete_after = time.perf_counter() - start
        final_wait = time_slowest_rank(writer.wait)
    return {
        "synchronous": synchronous,
        "blocked": snapshot + optimizer_wait + final_wait,
        "optimizer_waited": optimizer_wait,
        "complete_after": complete_after,
        "steps_beside": len(steps_beside),
        "quiet_step": statistics.median(quiet_steps),
        "step_beside": statistics.mean(steps_beside),
    }


def run_rank(rank: int, world_size: int, work: Path, args: argparse.Namespace) -> None:
    """Take all turns as one rank; rank 0 saves their figures and the files' sizes in `work`/record<world_size>."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{work}/meeting{world_size}", rank=rank, world_size=world_size)
    config = compose("config", [f"model.path={work / 'model'}", "data.train_files=[none]", "model.token_budget=1024"])
    parallel.start(config.model)
    policy = Policy(config.model, total_optimizer_steps=10**6)
    rollouts = make_random_rollouts(questions=args.questions, limit=96)
    train_one_step(policy, rollouts)
    directory = work / f"checkpoints{world_size}"
    turns = [measure_saves(policy, rollouts, directory, number) for number in range(args.repeats + 1)]
    if rank == 0:
        sizes = [file.stat().st_size / 1e6 for file in directory.rglob("*.distcp")]
        torch.save({"megabytes": sizes, "turns": turns[1:]}, work / f"record{world_size}")
    parallel.stop()


def summarize(record: dict[str, Any]) -> dict[str, Any]:
    """The medians over turns of all figures and of two ratios of them; megabytes: the size of each rank's file."""
    turns = record["turns"]
    medians = {name: statistics.median(t[name] for t in turns) for name in turns[0]}
    return medians | {
        "megabytes": record["megabytes"],
        "blocked_share": statistics.median(t["blocked"] / t["synchronous"] for t in turns),
        "slowdown_beside": statistics.median(t["step_beside"] / t["quiet_step"] for t in turns),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512, help="512: 200 MB of weights and optimizer state")
    parser.add_argument("--questions", type=int, default=1, help="questions of a training step, each with 8 responses")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    runs, results = {}, {}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        make_model(work / "model", 96, ends=True, hidden=args.hidden)
        for world_size in (1, 2):
            torch.multiprocessing.spawn(run_rank, (world_size, work, args), nprocs=world_size)
            record = torch.load(work / f"record{world_size}")
            runs[world_size], results[world_size] = record["turns"], summarize(record)
    for world_size, r in results.items():
        print(f"{world_size} processes, {sum(r['megabytes']):.0f} MB: training waits {r['synchronous']:.2f} s", end=" ")
        print(f"for a synchronous save and {r['blocked']:.3f} s for one in the background", end=" ")
        print(f"({100 * r['blocked_share']:.1f}%); a training step beside it", end=" ")
        print(f"takes {r['slowdown_beside']:.2f} times as long")
    sizes = {name: value for name, value in vars(args).items() if isinstance(value, int)}
    write_record(args.output, {"benchmark": "checkpoint", "settings": sizes, "result": results, "runs": runs})


if __name__ == "__main__":
    main()
