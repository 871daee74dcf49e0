"""Run one section of the GPU benchmark in this process: `python section.py NAME --results FILE [--tiny]`.

Reads the results of earlier sections from FILE, and prints this section's result as JSON on the last line.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from setting import Setting

# Module and function of each section, and the most seconds that it may take. The others need the first two: `floors`
# gives the rates to compare with, and `correctness` decides whether the figures count.
SECTIONS = {
    "floors": ("floors:run", 35),
    "correctness": ("correctness:run", 100),
    "train_1p5b_8k": ("train_shapes:train_1p5b_8k", 80),
    "log_probs": ("heads:run", 60),
    "attention": ("attention_variants:run", 30),
    "baseline_unpadded": ("baselines:unpadded", 70),
    "step": ("step:run", 80),
    "decode": ("decoding:run", 70),
    "train_1p5b_8k_long": ("train_shapes:train_1p5b_8k_long", 60),
    "train_qwen3_0p6b_16k": ("train_shapes:train_qwen3_0p6b_16k", 50),
    "train_qwen3_0p6b_65k": ("train_shapes:train_qwen3_0p6b_65k", 60),
    "train_7b_8k": ("train_shapes:train_7b_8k", 90),
    "baseline_padded": ("baselines:padded", 80),
    "train_1p5b_8k_local": ("train_shapes:train_1p5b_8k_local", 60),
}


def load_section(name: str) -> Callable[[Setting], dict[str, Any]]:
    module, function = SECTIONS[name][0].split(":")
    section: Callable[[Setting], dict[str, Any]] = getattr(import_module(module), function)
    return section


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=SECTIONS)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    results = json.loads(args.results.read_text()) if args.results.exists() else {}
    result = load_section(args.name)(Setting(args.tiny, results))
    sys.stdout.flush()
    print(json.dumps(result), flush=True)
    sys.stderr.flush()
    os._exit(0)  # at once, since the shutdown of CUDA or NCCL might still change the exit code


if __name__ == "__main__":
    main()
