"""A refit into another process against a plain copy of the same bytes, and the memory that it adds.

    OMP_NUM_THREADS=1 python benchmarks/refit.py [--millions 4 30 117 500] [--vllm PYTHON] [--output FILE.json]

A policy of Qwen2's architecture (grouped queries, an MLP four times as wide) in float32, random, one process. `plain`:
a worker that only keeps the weights, so the wire, the staging memory and the checksums on both sides. `vllm`: vLLM's
own work on top (it repacks each matrix for the CPU), and `vllm_floor`, that work alone, on tensors that are in its
process already. The copy is one torch.copy_ a tensor in this process, one thread, and takes turns with the refits.
Wall-clock seconds, medians; beside them the fastest turn, since other work on the machine only adds.
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

import ours
import plain_engine
import torch
from common import write_record
from torch import Tensor

from nemo_disco.generation.external.engine import ExternalEngine
from nemo_disco.generation.external.replica import Place, Replica
from nemo_disco.policy import parallel
from nemo_disco.policy.policy import Policy

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from fake_engine import fake_python

# Parameters, in millions: hidden size, layers, heads of keys and values, vocabulary.
SHAPES = {4: (192, 6, 1, 2048), 30: (512, 6, 2, 9216), 117: (768, 11, 2, 16384), 500: (1280, 18, 4, 32768)}


def make_policy(directory: Path, millions: int) -> Policy:
    """A model directory, and its policy."""
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
    model = ours.settings(directory).model
    parallel.start(model)
    return Policy(model, trainable=False)


def replica(directory: Path, engine: str, python: str) -> Replica:
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


def seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def figures(turns: list[float]) -> dict[str, Any]:
    return {"seconds": statistics.median(turns), "fastest": min(turns), "turns": turns}


def resident(process: str, field: str) -> int:
    """Bytes: VmRSS is resident now, VmHWM the peak since clear_refs."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def processor_seconds(process: str) -> float:
    """Of a process's main thread."""
    return int(Path(f"/proc/{process}/schedstat").read_text().split()[0]) / 1e9


class Copy:
    """A plain copy of the weights."""

    def __init__(self, policy: Policy) -> None:
        self.weights = [(tensor, torch.empty_like(tensor)) for _, tensor in policy.named_weights()]

    def __call__(self) -> None:
        for tensor, own in self.weights:
            own.copy_(tensor)


def measure(engine: ExternalEngine, policy: Policy, repeats: int) -> dict[str, Any]:
    """Refits and copies in turns, and what a refit adds to both processes' memory at its peak."""
    version, found = 0, []
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
        Path(f"/proc/{pid}/clear_refs").write_text("5")
        before[name] = resident(pid, "VmRSS")
    refit()
    added = {f"{name}_added_mb": (resident(pid, "VmHWM") - before[name]) / 1e6 for name, pid in pids.items()}
    copy = Copy(policy)
    copy()
    for _ in range(repeats):
        started = {name: processor_seconds(pid) for name, pid in pids.items()}
        wall = seconds(refit)
        worked = {name: processor_seconds(pid) - started[name] for name, pid in pids.items()}
        found.append((wall, seconds(copy), worked))
    return {
        **figures([turn[0] for turn in found]),
        "processor_seconds": {name: statistics.median(turn[2][name] for turn in found) for name in pids},
        "copy": figures([turn[1] for turn in found]),
        "slot_mb": engine.replicas[0].staging.slot_bytes / 1e6,
        **added,
    }


def vllm_floor(python: str, settings: dict[str, Any], repeats: int) -> dict[str, Any]:
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
    return figures(json.loads(done.stdout.splitlines()[-1]))


def compare(millions: int, args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as work:
        directory = Path(work)
        policy = make_policy(directory, millions)
        tensors: list[Tensor] = [tensor for _, tensor in policy.named_weights()]
        size = sum(tensor.nbytes for tensor in tensors)
        gather = [seconds(lambda: [None for _ in policy.named_weights()]) for _ in range(args.repeats)]
        result: dict[str, Any] = {
            "parameters": sum(tensor.numel() for tensor in tensors),
            "gb": size / 1e9,
            "gather": figures(gather),
        }
        del tensors
        for name, python in (("plain", fake_python(directory, plain_engine.__file__)), ("vllm", args.vllm)):
            if python is None:
                continue
            engine = ExternalEngine([replica(directory, name, python)])
            try:
                result[name] = measure(engine, policy, args.repeats) | {"start": engine.replicas[0].start_seconds}
            finally:
                engine.close()
            r = result[name]
            r["gb_per_second"] = size / 1e9 / r["seconds"]
            r["times_the_copy"] = r["seconds"] / r["copy"]["seconds"]
            r["fastest_times_the_copy"] = r["fastest"] / r["copy"]["fastest"]
        if args.vllm:
            settings = replica(directory, "vllm", args.vllm).settings
            result["vllm_floor"] = vllm_floor(args.vllm, settings, args.repeats)
            result["vllm"]["times_the_floor"] = result["vllm"]["seconds"] / result["vllm_floor"]["seconds"]
            result["vllm"]["fastest_times_the_floor"] = result["vllm"]["fastest"] / result["vllm_floor"]["fastest"]
    return result


def show(result: dict[str, Any]) -> None:
    size = f"{result['parameters'] / 1e6:.0f}M parameters, {result['gb']:.2f} GB"
    print(f"{size}; gather {result['gather']['seconds']:.4f} s")
    for name in ("plain", "vllm"):
        if name in result:
            r = result[name]
            ratio = f"{r['times_the_copy']:6.2f} x the copy (fastest {r['fastest_times_the_copy']:.2f})"
            speed = f"{r['seconds']:8.3f} s {r['gb_per_second']:7.2f} GB/s {ratio}"
            memory = f"adds {r['run_added_mb']:.0f} MB here, {r['worker_added_mb']:.0f} MB there"
            print(f"  {name:6}{speed}; {memory}; start {r['start']['total']:.1f} s")
    if "vllm_floor" in result:
        r = result["vllm"]
        ratio = f"{r['times_the_floor']:.2f} x that (fastest {r['fastest_times_the_floor']:.2f})"
        print(f"  vLLM's own reload takes {result['vllm_floor']['seconds']:.3f} s: the refit is {ratio}")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=int, nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--vllm", metavar="PYTHON", help="the interpreter that has vLLM; without it vLLM is left out")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for millions in args.millions:
        results[f"{millions}M"] = compare(millions, args)
        show(results[f"{millions}M"])
    write_record(args.output, {"benchmark": "refit", "settings": {"repeats": args.repeats}, "results": results})


if __name__ == "__main__":
    main()
