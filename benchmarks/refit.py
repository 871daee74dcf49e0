"""A refit into another process against a plain copy of the same bytes, and the memory that it adds.

    OMP_NUM_THREADS=1 python benchmarks/refit.py [--millions 4 20 100 500] [--vllm PYTHON] [--output FILE.json]

Models of Qwen2's architecture in float32, random. `plain`: a worker that only keeps the weights, so the wire, the
staging memory and the checksums on both sides. `vllm`: vLLM's own work on top (it repacks each matrix for the CPU); its
start-up is timed too. The copy is one torch.copy_ a tensor in this process, one thread. Wall-clock seconds, medians.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plain_engine
import torch
import torch.distributed as dist
from common import write_record
from torch import Tensor

from nemo_disco.generation.external import ExternalEngine
from nemo_disco.generation.replica import Place, Replica

# Parameters, in millions: hidden size, layers, vocabulary.
SHAPES = {4: (192, 6, 2048), 20: (384, 8, 8192), 100: (768, 12, 16384), 500: (1280, 24, 32768)}


def make_model(directory: Path, millions: int) -> dict[str, Tensor]:
    """A model directory, and its weights."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    hidden, layers, vocabulary = SHAPES[millions]
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
    )
    model = Qwen2ForCausalLM(config)
    model.save_pretrained(directory)
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def replica(directory: Path, engine: str, python: str) -> Replica:
    settings = {
        "engine": engine,
        "model": str(directory),
        "dtype": "float32",
        "bucket_bytes": 64 << 20,
        "stop_token_ids": [0],
        "max_length": 256,
        "tensor_parallel_size": 1,
        "trust_remote_code": False,
        "quantization": None,
        "sleeps": False,
        "options": {"kv_cache_memory_bytes": 1 << 26},
    }
    return Replica(engine, Place(python, directory / f"{engine}.log"), settings)


def seconds(work: Callable[[], Any], repeats: int) -> list[float]:
    """Of each turn, after one to warm up."""
    work()
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return found


def resident(process: str, field: str) -> int:
    """Bytes: VmRSS is resident now, VmHWM the peak since clear_refs."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def measure(engine: ExternalEngine, weights: dict[str, Tensor], repeats: int) -> dict[str, Any]:
    """Refits' seconds, and what the last of them added to both processes' memory at its peak."""
    version = 0

    def refit() -> None:
        nonlocal version
        version += 1
        engine.update_weights(weights.items, version)

    turns = seconds(refit, repeats)
    process = engine.replicas[0]._process
    assert process is not None
    pids = {"run": "self", "worker": str(process.pid)}
    before = {}
    for name, pid in pids.items():
        Path(f"/proc/{pid}/clear_refs").write_text("5")
        before[name] = resident(pid, "VmRSS")
    refit()
    added = {f"{name}_added_mb": (resident(pid, "VmHWM") - before[name]) / 1e6 for name, pid in pids.items()}
    return {
        "seconds": statistics.median(turns),
        "turns": turns,
        "slot_mb": engine.replicas[0].ready["slot_bytes"] / 1e6,
        **added,
    }


def compare(millions: int, args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as work:
        directory = Path(work)
        weights = make_model(directory, millions)
        size = sum(t.nbytes for t in weights.values())
        target = {name: torch.empty_like(t) for name, t in weights.items()}
        copy = seconds(lambda: [target[name].copy_(t) for name, t in weights.items()], args.repeats)
        target.clear()
        result: dict[str, Any] = {
            "parameters": sum(t.numel() for t in weights.values()),
            "gb": size / 1e9,
            "copy": {"seconds": statistics.median(copy), "turns": copy},
        }
        for name, python in (("plain", plain_engine.python(directory)), ("vllm", args.vllm)):
            if python is None:
                continue
            engine = ExternalEngine([replica(directory, name, python)])
            try:
                result[name] = measure(engine, weights, args.repeats) | {"start": engine.replicas[0].start_seconds}
            finally:
                engine.close()
            result[name]["gb_per_second"] = size / 1e9 / result[name]["seconds"]
            result[name]["times_the_copy"] = result[name]["seconds"] / result["copy"]["seconds"]
    return result


def show(result: dict[str, Any]) -> None:
    print(
        f"{result['parameters'] / 1e6:.0f}M parameters, {result['gb']:.2f} GB; copy {result['copy']['seconds']:.3f} s"
    )
    for name in ("plain", "vllm"):
        if name in result:
            r = result[name]
            speed = f"{r['seconds']:8.3f} s {r['gb_per_second']:7.2f} GB/s {r['times_the_copy']:6.2f} x the copy"
            memory = f"adds {r['run_added_mb']:.0f} MB here, {r['worker_added_mb']:.0f} MB there"
            print(f"  {name:6}{speed}; {memory}; start {r['start']['total']:.1f} s")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=int, nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--vllm", metavar="PYTHON", help="the interpreter that has vLLM; without it vLLM is left out")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    results = {}
    for millions in args.millions:
        results[f"{millions}M"] = compare(millions, args)
        show(results[f"{millions}M"])
    write_record(args.output, {"benchmark": "refit", "settings": {"repeats": args.repeats}, "results": results})


if __name__ == "__main__":
    main()
