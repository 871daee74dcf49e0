"""Training time lost to a checkpoint: a save that is waited for against one written in the background.

The two take turns in the same processes (1, then 2 of one thread, data-parallel), on 200 MB of weights and optimizer
state, each after a barrier; the slowest rank counts. In the background, training steps go on until the checkpoint is
complete; how much longer they take than quiet ones is reported beside. What training waits for is the snapshot, and the
optimizer of the first step after it for the weights to be read (in a run that step samples first).
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
from train_step import made_up_rollouts

from nemo_disco.checkpoint.writer import CheckpointWriter
from nemo_disco.config.compose import compose
from nemo_disco.data.rollouts import Rollouts
from nemo_disco.policy import parallel
from nemo_disco.policy.policy import Policy

QUIET_STEPS = 2


def slowest(work: Callable[[], object]) -> float:
    """Wall seconds until the last rank is done, all having begun together."""
    dist.barrier()
    start = time.perf_counter()
    work()
    taken = torch.tensor(time.perf_counter() - start)
    dist.all_reduce(taken, op=dist.ReduceOp.MAX)
    return float(taken)


def everywhere(flag: bool) -> bool:
    votes = torch.tensor(int(flag))
    dist.all_reduce(votes, op=dist.ReduceOp.MIN)
    return bool(votes)


def train(policy: Policy, rollouts: Rollouts) -> None:
    total = int(rollouts.response_lengths.sum())
    policy.accumulate(rollouts, lambda _, log_probs, __: log_probs / total)
    policy.step()


def first_step(policy: Policy, rollouts: Rollouts) -> tuple[float, float]:
    """A training step beside a save: seconds that its optimizer waits for the weights to be read, and the others."""
    assert policy.optimizer is not None
    total = int(rollouts.response_lengths.sum())
    gradient = slowest(lambda: policy.accumulate(rollouts, lambda _, log_probs, __: log_probs / total))
    waited = slowest(policy.optimizer.weights_read.wait)
    return waited, gradient + slowest(policy.step)


def turn(policy: Policy, rollouts: Rollouts, directory: Path, number: int) -> dict[str, float]:
    """One save of each kind, and the steps around them."""
    with CheckpointWriter() as writer:

        def save() -> None:
            writer.save(policy, directory, number, {}, keep=1)

        def save_and_wait() -> None:
            save()
            writer.wait()

        waited = slowest(save_and_wait)
        quiet = [slowest(lambda: train(policy, rollouts)) for _ in range(QUIET_STEPS)]
        start = time.perf_counter()
        blocked = slowest(save)
        optimizer_waited, first = first_step(policy, rollouts)
        busy = [first]
        while not everywhere(writer.done):
            busy.append(slowest(lambda: train(policy, rollouts)))
        complete = time.perf_counter() - start
        waited_at_the_end = slowest(writer.wait)
    return {
        "synchronous": waited,
        "blocked": blocked + optimizer_waited + waited_at_the_end,
        "optimizer_waited": optimizer_waited,
        "complete_after": complete,
        "steps_beside": len(busy),
        "quiet_step": statistics.median(quiet),
        "step_beside": statistics.mean(busy),
    }


def rank_main(rank: int, world_size: int, work: Path, args: argparse.Namespace) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{work}/meeting{world_size}", rank=rank, world_size=world_size)
    config = compose("config", [f"model.path={work / 'model'}", "data.train_files=[none]", "model.token_budget=1024"])
    parallel.start(config.model)
    policy = Policy(config.model, total_optimizer_steps=10**6)
    rollouts = made_up_rollouts(questions=args.questions, limit=96)
    train(policy, rollouts)
    turns = [turn(policy, rollouts, work / f"checkpoints{world_size}", number) for number in range(args.repeats + 1)]
    if rank == 0:
        sizes = [file.stat().st_size / 1e6 for file in (work / f"checkpoints{world_size}").rglob("*.distcp")]
        torch.save({"megabytes": sizes, "turns": turns[1:]}, work / f"record{world_size}")
    parallel.stop()


def summary(record: dict[str, Any]) -> dict[str, Any]:
    """megabytes: of each rank's file. The rest are medians over turns."""
    turns = record["turns"]
    middle = {name: statistics.median(t[name] for t in turns) for name in turns[0]}
    return middle | {
        "megabytes": record["megabytes"],
        "blocked_share": statistics.median(t["blocked"] / t["synchronous"] for t in turns),
        "slowdown_beside": statistics.median(t["step_beside"] / t["quiet_step"] for t in turns),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512, help="512: 200 MB of weights and optimizer state")
    parser.add_argument("--questions", type=int, default=1, help="of a training step, with 8 responses each")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    runs, results = {}, {}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        make_model(work / "model", 96, ends=True, hidden=args.hidden)
        for world_size in (1, 2):
            torch.multiprocessing.spawn(rank_main, (world_size, work, args), nprocs=world_size)
            record = torch.load(work / f"record{world_size}")
            runs[world_size], results[world_size] = record["turns"], summary(record)
    for world_size, r in results.items():
        print(f"{world_size} processes, {sum(r['megabytes']):.0f} MB: {r['synchronous']:.2f} s waited for", end=", ")
        print(f"{r['blocked']:.3f} s in the background, {100 * r['blocked_share']:.1f}%", end="; ")
        print(f"a training step beside it takes {r['slowdown_beside']:.2f} times as long")
    sizes = {name: value for name, value in vars(args).items() if isinstance(value, int)}
    write_record(args.output, {"benchmark": "checkpoint", "settings": sizes, "result": results, "runs": runs})


if __name__ == "__main__":
    main()
