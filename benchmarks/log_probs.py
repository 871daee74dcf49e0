"""Time and peak memory of token_log_probs against plain PyTorch and against torch.utils.checkpoint by chunks.

    OMP_NUM_THREADS=1 python benchmarks/log_probs.py [--tokens 2048 --vocab 151936 --hidden 256] [--output FILE.json]

Forward and backward in float32 on the CPU, each variant in processes of its own and in turn; a table, then JSON.
Seconds are processor time, so that what else runs on the machine counts little.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nemo_disco.policy.log_probs import token_log_probs

TEMPERATURE = 0.6
CHUNK = 2**24  # logits in a chunk of `checkpointed`


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(hidden, weight).float().div_(TEMPERATURE)
    return logits.log_softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1)


def checkpointed(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    step = max(64, CHUNK // len(weight))
    chunks = zip(torch.split(hidden, step), torch.split(targets, step), strict=True)
    return torch.cat([checkpoint(plain, h, weight, t, use_reentrant=False) for h, t in chunks])


def tiled(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return token_log_probs(hidden, weight, targets, temperature=TEMPERATURE)[0]


def tiled_entropies(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    log_probs, entropies = token_log_probs(hidden, weight, targets, temperature=TEMPERATURE, entropies=True)
    assert entropies is not None
    return torch.cat([log_probs, entropies])


VARIANTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "plain": plain,
    "checkpointed": checkpointed,
    "tiled": tiled,
    "tiled_entropies": tiled_entropies,
}


def memory(field: str) -> int:
    """Bytes: VmRSS is resident now, VmHWM its peak (ru_maxrss will not do: a child inherits its parent's)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def run_once(step: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    out = step(*inputs)
    torch.autograd.backward(out.sum())
    return out


def measure(variant: str, tokens: int, vocab: int, hidden: int) -> dict[str, float]:
    """Seconds of forward and backward, and peak bytes beyond inputs, outputs and gradients of hidden and weight."""
    step = VARIANTS[variant]
    small = (torch.ones(8, hidden, requires_grad=True), torch.ones(8, hidden, requires_grad=True), torch.arange(8))
    run_once(step, small)  # the libraries' own buffers, threads and lazily loaded code are not what is measured
    torch.manual_seed(0)
    states, weight = torch.randn(tokens, hidden), torch.randn(vocab, hidden).mul_(3 / hidden**0.5)
    inputs = (states.requires_grad_(), weight.requires_grad_(), torch.randint(vocab, (tokens,)))
    before = memory("VmRSS")
    start = time.process_time()
    out = run_once(step, inputs)
    seconds = time.process_time() - start
    results = sum(x.numel() * x.element_size() for x in (out, *inputs[:2]))  # a gradient is as large as its input
    return {"seconds": seconds, "extra_bytes": memory("VmHWM") - before - results}


def compare(sizes: list[str], repeats: int) -> dict[str, dict[str, float]]:
    """The best time and the largest memory of each variant; in turn, so that a busy moment hits all of them."""
    runs: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
    for _ in range(repeats):
        for variant, done in runs.items():
            command = [sys.executable, __file__, "--one", variant, *sizes]
            done.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
    best = {
        variant: {"seconds": min(r["seconds"] for r in done), "extra_bytes": max(r["extra_bytes"] for r in done)}
        for variant, done in runs.items()
    }
    for row in best.values():
        row["time_against_plain"] = row["seconds"] / best["plain"]["seconds"]
        row["memory_against_plain"] = row["extra_bytes"] / best["plain"]["extra_bytes"]
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--output", type=Path, help="also write the JSON there")
    parser.add_argument("--one", choices=VARIANTS, help="measure this variant alone, in this process")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args.tokens, args.vocab, args.hidden)))
        return
    sizes = [f"--{name}={getattr(args, name)}" for name in ("tokens", "vocab", "hidden")]
    result = compare(sizes, args.repeats)
    logits = args.tokens * args.vocab * 4
    print(f"{args.tokens} tokens, vocabulary {args.vocab}, hidden {args.hidden}, {torch.get_num_threads()} thread(s)")
    print(f"{'':16}{'seconds':>9}{'x plain':>9}{'MB':>9}{'x plain':>9}{'x logits':>9}")
    for variant, row in result.items():
        time_columns = f"{row['seconds']:9.2f}{row['time_against_plain']:9.2f}"
        memory_columns = f"{row['extra_bytes'] / 1e6:9.0f}{row['memory_against_plain']:9.3f}"
        print(f"{variant:16}{time_columns}{memory_columns}{row['extra_bytes'] / logits:9.3f}")
    record = json.dumps({"tokens": args.tokens, "vocab": args.vocab, "hidden": args.hidden, "variants": result})
    print(record)
    if args.output:
        args.output.write_text(record + "\n")


if __name__ == "__main__":
    main()
