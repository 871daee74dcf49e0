"""A training loop with background saves that is killed at random moments: kill_saves.py MODEL CHECKPOINTS.

The loop runs in a child process, which is killed; the next child resumes, and checks that it has the weights that were
saved. The last child saves once and ends by itself. Children are forks, since importing everything takes seconds.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from tiny_models import model_config
from training import fingerprint, train

from nemo_disco import checkpoint
from nemo_disco.checkpoint.writer import CheckpointWriter
from nemo_disco.policy import parallel
from nemo_disco.policy.policy import Policy

ROUNDS = 6
sys.modules["psutil"] = None  # type: ignore[assignment]  # without it megatron's own writer waits for ever


def resume_and_save(model: Path, directory: Path, reports: int, *, saves: int | None) -> None:
    """Resume, then train and save `saves` times (None: until killed).

    reports: a pipe that gets a line of JSON after resuming (the step and the number of unfinished checkpoints), and a
    dot for each complete save.
    """
    torch.set_num_threads(1)
    unfinished = len(list(directory.glob("*.tmp-*"))) if directory.exists() else 0
    config = model_config(model)
    parallel.start(config)
    policy = Policy(config)
    start, state = checkpoint.load_latest(policy, directory) or (0, {})
    step = start
    intact = step == 0 or state["fingerprint"] == fingerprint(policy)
    assert intact, "the weights or the optimizer's state are not those that were saved"
    os.write(reports, json.dumps({"resumed_from": step, "left_unfinished": unfinished}).encode() + b"\n")
    writer = CheckpointWriter()
    while saves is None or step < start + saves:
        train(policy, [step])
        step += 1
        writer.save(policy, directory, step, {"fingerprint": fingerprint(policy)}, keep=2)
        if step > start + 1:  # the save before this one is complete
            os.write(reports, b".")
    writer.wait()


def main() -> None:
    model, directory = Path(sys.argv[1]), Path(sys.argv[2])
    rng = random.Random(0)
    for attempt in range(ROUNDS + 1):
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                resume_and_save(model, directory, write_end, saves=None if attempt < ROUNDS else 1)
            except BaseException as error:
                print(repr(error), file=sys.stderr)
                os._exit(1)
            os._exit(0)
        os.close(write_end)
        with os.fdopen(read_end, "rb", buffering=0) as reports:
            sys.stdout.write(reports.readline().decode())
            if attempt < ROUNDS:
                assert reports.read(1) == b"."  # one save is complete
                time.sleep(rng.uniform(0, 0.4))
                os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert status == (signal.SIGKILL if attempt < ROUNDS else 0), status


if __name__ == "__main__":
    main()
