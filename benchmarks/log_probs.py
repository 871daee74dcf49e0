"""Time and peak memory of token_log_probs against plain PyTorch, and against torch.utils.checkpoint in chunks.

    OMP_NUM_THREADS=1 python benchmarks/log_probs.py [--tokens 2048 --vocab 151936 --hidden 256] [--output FILE.json]

Each variant runs forward and backward in float32 on the CPU, each time in a new process; the variants alternate.
Prints a table and then JSON. Seconds are processor time, which other programs on the machine change little.
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
from common import resident_bytes
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nemo_disco.algorithms.objectives import Constraint
from nemo_disco.policy.likely_tokens import LikelyTokens, find_likely_tokens, token_divergences
from nemo_disco.policy.log_probs import token_log_probs

TEMPERATURE = 0.6
LIKELY = Constraint().top_k  # tokens that the constraint's estimator top_k compares by default
CHUNK_LOGITS = 2**24  # logits in a chunk of the variant `checkpointed`


# --- the variants ---
# hidden [T, width] and weight [vocabulary, width] give logits [T, vocabulary]; targets [T] are token ids. Each variant
# returns the targets' log-probs [T].


def compute_plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Log-probs by plain PyTorch, with all logits in memory."""
    logits = F.linear(hidden, weight).float().div_(TEMPERATURE)
    return logits.log_softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1)


def compute_checkpointed(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Log-probs in chunks of tokens, whose logits the backward pass computes again."""
    step = max(64, CHUNK_LOGITS // len(weight))
    chunks = zip(torch.split(hidden, step), torch.split(targets, step), strict=True)
    return torch.cat([checkpoint(compute_plain, h, weight, t, use_reentrant=False) for h, t in chunks])


def compute_tiled(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Log-probs by token_log_probs."""
    return token_log_probs(hidden, weight, targets, temperature=TEMPERATURE)[0]


def compute_tiled_entropies(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Log-probs and then entropies [2 T] by token_log_probs."""
    log_probs, entropies = token_log_probs(hidden, weight, targets, temperature=TEMPERATURE, entropies=True)
    assert entropies is not None
    return torch.cat([log_probs, entropies])


def compute_tiled_divergences(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Log-probs and then the KL to an old policy over LIKELY tokens [2 T], as in passes 1 and 2 of a mini-batch."""
    ids = (targets[:, None] + torch.arange(LIKELY + 1)) % len(weight)
    log_probs, _ = token_log_probs(hidden, weight, ids, temperature=TEMPERATURE)
    old = LikelyTokens(ids[:, 1:].int(), log_probs[:, 1:].detach() - 0.01, complete=False)
    return torch.cat([log_probs[:, 0], token_divergences(log_probs[:, 1:], old)])


def compute_tiled_and_find(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """As tiled_divergences, after the search for the likely tokens, which a step needs once, for the old policy."""
    find_likely_tokens(hidden, weight, LIKELY, vocab_size=len(weight))
    return compute_tiled_divergences(hidden, weight, targets)


VARIANTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "plain": compute_plain,
    "checkpointed": compute_checkpointed,
    "tiled": compute_tiled,
    "tiled_entropies": compute_tiled_entropies,
    "tiled_divergences": compute_tiled_divergences,
    "tiled_and_find": compute_tiled_and_find,
}


# --- measuring ---


def run_forward_backward(
    variant: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    """Run one variant forward, and backward from the sum of its outputs; returns the outputs."""
    out = variant(*inputs)
    torch.autograd.backward(out.sum())
    return out


def measure(name: str, tokens: int, vocab: int, hidden: int) -> dict[str, float]:
    """Measure one variant: `seconds` of forward and backward, and `extra_bytes` of memory at the peak.

    The extra bytes leave out the inputs, the outputs and the gradients of hidden and weight.
    """
    variant = VARIANTS[name]
    small = (torch.ones(8, hidden, requires_grad=True), torch.ones(32, hidden, requires_grad=True), torch.arange(8))
    run_forward_backward(variant, small)  # so that the libraries' buffers, threads and lazy imports are not measured
    torch.manual_seed(0)
    states, weight = torch.randn(tokens, hidden), torch.randn(vocab, hidden).mul_(3 / hidden**0.5)
    inputs = (states.requires_grad_(), weight.requires_grad_(), torch.randint(vocab, (tokens,)))
    before = resident_bytes("VmRSS")
    start = time.process_time()
    out = run_forward_backward(variant, inputs)
    seconds = time.process_time() - start
    results = sum(x.numel() * x.element_size() for x in (out, *inputs[:2]))  # a gradient is as large as its input
    return {"seconds": seconds, "extra_bytes": resident_bytes("VmHWM") - before - results}


def compare(sizes: list[str], repeats: int) -> dict[str, dict[str, float]]:
    """The shortest time and the largest memory of each variant over `repeats`, also as multiples of `plain`.

    The variants alternate, so that a busy moment of the machine slows all of them. sizes: options for the processes.
    """
    turns_by_variant: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
    for _ in range(repeats):
        for variant, turns in turns_by_variant.items():
            command = [sys.executable, __file__, "--one", variant, *sizes]
            turns.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
    rows = {
        variant: {"seconds": min(t["seconds"] for t in turns), "extra_bytes": max(t["extra_bytes"] for t in turns)}
        for variant, turns in turns_by_variant.items()
    }
    for row in rows.values():
        row["time_against_plain"] = row["seconds"] / rows["plain"]["seconds"]
        row["memory_against_plain"] = row["extra_bytes"] / rows["plain"]["extra_bytes"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--output", type=Path, help="write the JSON to this file too")
    parser.add_argument("--one", choices=VARIANTS, help="measure this variant alone, in this process")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args.tokens, args.vocab, args.hidden)))
        return
    sizes = [f"--{name}={getattr(args, name)}" for name in ("tokens", "vocab", "hidden")]
    result = compare(sizes, args.repeats)
    logits_bytes = args.tokens * args.vocab * 4
    print(f"{args.tokens} tokens, vocabulary {args.vocab}, hidden {args.hidden}, {torch.get_num_threads()} thread(s)")
    print(f"{'':18}{'seconds':>9}{'x plain':>9}{'MB':>9}{'x plain':>9}{'x logits':>9}")
    for variant, row in result.items():
        time_columns = f"{row['seconds']:9.2f}{row['time_against_plain']:9.2f}"
        memory_columns = f"{row['extra_bytes'] / 1e6:9.0f}{row['memory_against_plain']:9.3f}"
        print(f"{variant:18}{time_columns}{memory_columns}{row['extra_bytes'] / logits_bytes:9.3f}")
    record = json.dumps({"tokens": args.tokens, "vocab": args.vocab, "hidden": args.hidden, "variants": result})
    print(record)
    if args.output:
        args.output.write_text(record + "\n")


if __name__ == "__main__":
    main()
