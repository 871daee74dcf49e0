"""Time of a refit into another process against a plain copy of the same bytes, and the memory that the refit adds.

    OMP_NUM_THREADS=1 python benchmarks/refit.py [--millions 4 30 117 500] [--vllm PYTHON] [--output FILE.json]

The policy has random weights, Qwen2's architecture (grouped queries, an MLP four times as wide), float32, one process.
- `plain`: a refit into a worker that only stores the weights. It costs the messages, the staging memory and the
  checksums on both sides.
- `vllm`: a refit into vLLM, which also repacks each matrix for the CPU. `vllm_floor` is this work of vLLM alone, on
  tensors that are already in its process.
- `copy`: one torch.copy_ for each tensor in this process, in one thread. Copies and refits alternate.

Times are wall-clock seconds: the median, and the fastest turn, since other work on the machine can only add time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plain_engine
import torch
from benchmark_trainer import compose_config
from common import resident_bytes, write_record
from torch import Tensor

from nemo_disco.generation.external.engine import ExternalEngine
from nemo_disco.generation.external.replica import Place, Replica
from nemo_disco.policy import parallel
from nemo_disco.policy.policy import Policy

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from fake_engine import fake_python

# Millions of parameters -> hidden size, layers, key-value heads, size of the vocabulary.
SHAPES = {4: (192, 6, 1, 2048), 30: (512, 6, 2, 9216), 117: (768, 11, 2, 16384), 500: (1280, 18, 4, 32768)}


def make_policy(directory: Path, millions: int) -> Policy:
    """Save a random model in `directory` and load it as a policy without an optimizer."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    hidden, layers, groups, vocabulary = SHAPES[millions]
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=groups,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
    )
    Qwen2ForCausalLM(config).save_pretrained(directory)
    model = compose_config(directory).model
    parallel.start(model)
    return Policy(model, trainable=False)


def make_replica(directory: Path, engine: str, python: str) -> Replica:
    """A replica, not yet started, that runs the worker with the interpreter `python` on the model in `directory`."""
    settings = {
        "engine": engine,
        "model": str(directory),
        "dtype": "float32",
        "stop_token_ids": [0],
        "max_length": 256,
        "tensor_parallel_size": 1,
        "trust_remote_code": False,
        "quantization": None,
        "sleeps": False,
        "options": {"kv_cache_memory_bytes": 1 << 28},
    }
    return Replica(engine, Place(python, directory / f"{engine}.log"), settings)


def time_call(work: Callable[[], Any]) -> float:
    """Wall-clock seconds of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def summarize(seconds: list[float]) -> dict[str, Any]:
    """The median and the smallest of the turns' seconds, and all of them."""
    return {"seconds": statistics.median(seconds), "fastest": min(seconds), "turns": seconds}


def processor_seconds(process: str) -> float:
    """Processor time of a process's main thread."""
    return int(Path(f"/proc/{process}/schedstat").read_text().split()[0]) / 1e9


class PlainCopy:
    """A copy of the policy's weights into tensors of its own; each call repeats it."""

    def __init__(self, policy: Policy) -> None:
        self.pairs = [(tensor, torch.empty_like(tensor)) for _, tensor in policy.named_weights()]

    def __call__(self) -> None:
        for source, target in self.pairs:
            target.copy_(source)


def measure(engine: ExternalEngine, policy: Policy, repeats: int) -> dict[str, Any]:
    """Figures of `repeats` refits, which alternate with plain copies.

    seconds, fastest, turns: of the refits; copy: the same of the copies. processor_seconds: the median of a refit, in
    this process (`run`) and in the worker. run_added_mb, worker_added_mb: megabytes (10^6 bytes) that a refit adds to
    the memory of each at its peak. slot_mb: the size of a slot of the staging memory.
    """
    version = 0
    process = engine.replicas[0]._process
    assert process is not None
    pids = {"run": "self", "worker": str(process.pid)}

    def refit() -> None:
        nonlocal version
        version += 1
        engine.update_weights(policy.named_weights, version)

    refit()
    before = {}
    for name, pid in pids.items():
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # reset the peak memory
        before[name] = resident_bytes("VmRSS", pid)
    refit()
    added = {f"{name}_added_mb": (resident_bytes("VmHWM", pid) - before[name]) / 1e6 for name, pid in pids.items()}
    copy = PlainCopy(policy)
    copy()
    refit_seconds, copy_seconds, processor = [], [], []
    for _ in range(repeats):
        start = {name: processor_seconds(pid) for name, pid in pids.items()}
        refit_seconds.append(time_call(refit))
        processor.append({name: processor_seconds(pid) - start[name] for name, pid in pids.items()})
        copy_seconds.append(time_call(copy))
    return {
        **summarize(refit_seconds),
        "processor_seconds": {name: statistics.median(turn[name] for turn in processor) for name in pids},
        "copy": summarize(copy_seconds),
        "slot_mb": engine.replicas[0].staging.slot_bytes / 1e6,
        **added,
    }


def measure_vllm_floor(python: str, settings: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Seconds of vLLM's own reload of weights that are already in its process, from vllm_floor.py."""
    worker = Replica("floor", Place(python, Path()), settings)
    done = subprocess.run(
        [python, str(Path(__file__).with_name("vllm_floor.py"))],
        input=json.dumps(settings | {"repeats": repeats}) + "\n",
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=True,
        env=worker._environment(),
    )
    return summarize(json.loads(done.stdout.splitlines()[-1]))


def compare(millions: int, args: argparse.Namespace) -> dict[str, Any]:
    """Figures of all refits of a policy of that size; `gather` is the policy's own part, giving out its tensors."""
    with tempfile.TemporaryDirectory() as work:
        directory = Path(work)
        policy = make_policy(directory, millions)
        tensors: list[Tensor] = [tensor for _, tensor in policy.named_weights()]
        size = sum(tensor.nbytes for tensor in tensors)
        gather = [time_call(lambda: [None for _ in policy.named_weights()]) for _ in range(args.repeats)]
        result: dict[str, Any] = {
            "parameters": sum(tensor.numel() for tensor in tensors),
            "gb": size / 1e9,
            "gather": summarize(gather),
        }
        del tensors
        for name, python in (("plain", fake_python(directory, plain_engine.__file__)), ("vllm", args.vllm)):
            if python is None:
                continue
            engine = ExternalEngine([make_replica(directory, name, python)])
            try:
                result[name] = measure(engine, policy, args.repeats) | {"start": engine.replicas[0].start_seconds}
            finally:
                engine.close()
            r = result[name]
            r["gb_per_second"] = size / 1e9 / r["seconds"]
            r["times_the_copy"] = r["seconds"] / r["copy"]["seconds"]
            r["fastest_times_the_copy"] = r["fastest"] / r["copy"]["fastest"]
        if args.vllm:
            settings = make_replica(directory, "vllm", args.vllm).settings
            result["vllm_floor"] = measure_vllm_floor(args.vllm, settings, args.repeats)
            result["vllm"]["times_the_floor"] = result["vllm"]["seconds"] / result["vllm_floor"]["seconds"]
            result["vllm"]["fastest_times_the_floor"] = result["vllm"]["fastest"] / result["vllm_floor"]["fastest"]
    return result


def print_result(result: dict[str, Any]) -> None:
    size = f"{result['parameters'] / 1e6:.0f}M parameters, {result['gb']:.2f} GB"
    print(f"{size}; iterating over the policy's tensors takes {result['gather']['seconds']:.4f} s")
    for name in ("plain", "vllm"):
        if name in result:
            r = result[name]
            ratio = f"{r['times_the_copy']:6.2f} x the copy (fastest {r['fastest_times_the_copy']:.2f})"
            speed = f"{r['seconds']:8.3f} s {r['gb_per_second']:7.2f} GB/s {ratio}"
            memory = f"adds {r['run_added_mb']:.0f} MB to the trainer and {r['worker_added_mb']:.0f} MB to the worker"
            print(f"  {name:6}{speed}; {memory}; the worker starts in {r['start']['total']:.1f} s")
    if "vllm_floor" in result:
        r = result["vllm"]
        ratio = f"{r['times_the_floor']:.2f} times that (fastest {r['fastest_times_the_floor']:.2f})"
        print(f"  vLLM's own reload takes {result['vllm_floor']['seconds']:.3f} s: the refit takes {ratio}")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=int, nargs="+", choices=SHAPES, default=list(SHAPES), help="parameters")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--vllm", metavar="PYTHON", help="the interpreter that has vLLM; without it vLLM is left out")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for millions in args.millions:
        results[f"{millions}M"] = compare(millions, args)
        print_result(results[f"{millions}M"])
    write_record(args.output, {"benchmark": "refit", "settings": {"repeats": args.repeats}, "results": results})


if __name__ == "__main__":
    main()
