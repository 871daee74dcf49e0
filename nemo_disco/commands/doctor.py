"""`nemo-disco doctor`: which kernels and engines this machine has, and what is missing for which feature.

Looks at package metadata, files and commands; imports none of what it looks for (Transformer Engine is tried in a
process of its own, since a broken one takes megatron-core down with it). Must not import torch.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from packaging.version import Version
from rich.console import Console
from rich.table import Table

# Distribution, and the versions that this project works with: [at least, below).
PACKAGES: dict[str, tuple[str, str] | None] = {
    "torch": ("2.11", "2.14"),
    "megatron-core": ("0.16.1", "0.17"),
    "mbridge": ("0.15.1", "0.16"),
    "einops": None,
    "psutil": None,
    "transformers": ("5.16.1", "5.20"),
    "math-verify": ("0.9", "0.10"),
    "antlr4-python3-runtime": ("4.9", "4.10"),
    "pyarrow": None,
    "tensorboard": None,
    "transformer-engine": ("2.9", "2.12"),
    "apex": None,
    "wandb": None,
}
# Where the range is wider than what every test of this project ran with: [at least, below).
TESTED = {"torch": ("2.13", "2.14")}
# Engines have environments of their own: where conf/generation/ looks for them (docs/engines.md).
ENGINE_PYTHONS = {"vllm": ".venv-vllm/bin/python", "tensorrt_llm": ".venv-trtllm/bin/python"}
TRAINING = ("torch", "megatron-core", "mbridge", "einops", "psutil", "transformers")


@dataclass(frozen=True)
class Part:
    """Something that this machine has (`found`: a version or a description) or has not (None)."""

    name: str
    found: str | None
    problem: str = ""  # why it is of no use although it is there
    note: str = ""  # what to know although it is of use

    @property
    def usable(self) -> bool:
        return self.found is not None and not self.problem


@dataclass(frozen=True)
class Feature:
    """What one can do here; missing is empty if one can."""

    name: str
    missing: str
    needed: bool = False  # without it nothing works


def main(_: argparse.Namespace) -> int:
    """Exit code 1 where something is missing that every run needs."""
    return 0 if print_doctor() else 1


def print_doctor(console: Console | None = None) -> bool:
    """Print what is here and what can be done with it; False if what every run needs is missing."""
    console = console or Console()
    parts = examine()
    found = Table("part", "here", title="this machine", title_justify="left")
    for part in parts.values():
        state = part.found or "[dim]-[/dim]"
        said = f" [red]{part.problem}[/red]" if part.problem else f" [yellow]{part.note}[/yellow]" if part.note else ""
        found.add_row(part.name, state + said)
    console.print(found)
    can = Table("feature", "", title="what it can do", title_justify="left")
    listed = features(parts)
    for feature in listed:
        can.add_row(
            feature.name, f"[yellow]no: {feature.missing}[/yellow]" if feature.missing else "[green]yes[/green]"
        )
    console.print(can)
    return not any(feature.needed and feature.missing for feature in listed)


def examine() -> dict[str, Part]:
    """Every part by name."""
    parts = [
        Part("Python", ".".join(map(str, sys.version_info[:3]))),
        Part("CPU cores", str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())),
        _gpus(),
        _cuda_build(),
        *(_package(name, bounds) for name, bounds in PACKAGES.items()),
        *(Part(f"{name}'s Python", path if shutil.which(path) else None) for name, path in ENGINE_PYTHONS.items()),
        Part("SLURM", _output(["srun", "--version"])),
    ]
    return {part.name: part for part in parts}


def features(parts: Mapping[str, Part]) -> list[Feature]:
    """What these parts allow, and for each feature that they do not, what is missing."""
    gpu = ("NVIDIA GPU", "torch with CUDA")
    fused = any(parts[name].usable for name in ("transformer-engine", "apex"))
    return [
        Feature("train on the CPU (gloo)", _missing(parts, TRAINING), needed=True),
        Feature("parts for training on GPUs (NCCL, BF16)", _missing(parts, (*TRAINING, *gpu))),
        Feature("attention on packed sequences (SDPA)", _missing(parts, ("torch",))),
        Feature("flash attention on packed sequences (BF16)", _missing(parts, ("torch", *gpu))),
        Feature("fused optimizer and norms", "" if fused else "transformer-engine or apex; torch's own are used"),
        Feature("FP8 and Transformer Engine layers", _missing(parts, ("transformer-engine", *gpu))),
        Feature("engine megatron", _missing(parts, TRAINING), needed=True),
        *(Feature(f"engine {name}", _missing(parts, (f"{name}'s Python",))) for name in ENGINE_PYTHONS),
        Feature("grade mathematics", _missing(parts, ("math-verify", "antlr4-python3-runtime")), needed=True),
        Feature("Parquet question files", _missing(parts, ("pyarrow",))),
        Feature("TensorBoard", _missing(parts, ("tensorboard",))),
        Feature("Weights & Biases", _missing(parts, ("wandb",))),
        Feature("several nodes under SLURM", _missing(parts, ("SLURM",))),
    ]


def _missing(parts: Mapping[str, Part], names: Iterable[str]) -> str:
    lacking = [parts[name] for name in names if not parts[name].usable]
    return ", ".join(f"{part.name} ({part.problem})" if part.problem else part.name for part in lacking)


def _package(name: str, bounds: tuple[str, str] | None) -> Part:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Part(name, None)
    problem = note = ""
    if bounds is not None and not _within(version, bounds):
        problem = f"works with >= {bounds[0]}, < {bounds[1]}"
    elif not _within(version, TESTED.get(name, bounds)):
        least, below = TESTED[name]
        note = f"expected to work; tested with >= {least}, < {below}"
    if name == "transformer-engine" and not problem:
        problem = import_problem("transformer_engine.pytorch")
    return Part(name, version, problem, note)


def _within(version: str, bounds: tuple[str, str] | None) -> bool:
    return bounds is None or Version(bounds[0]) <= Version(Version(version).public) < Version(bounds[1])


def import_problem(module: str) -> str:
    """Why a module that is installed does not import, found in a process of its own; empty if it does.

    Transformer Engine without cuDNN raises RuntimeError; megatron-core is ready for ImportError alone and crashes.
    """
    try:
        tried = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return f"import {module} does not end"
    if tried.returncode == 0:
        return ""
    last = (tried.stderr.strip().splitlines() or [f"exit code {tried.returncode}"])[-1]
    return f"does not import ({last}), and megatron-core fails with it: mend it or uninstall it"


def _cuda_build() -> Part:
    """The CUDA version that torch was built for, read from its version.py without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return Part("torch with CUDA", None)
    text = (Path(spec.origin).parent / "version.py").read_text()
    built = re.search(r"^cuda\b.*=\s*['\"](.+?)['\"]", text, re.MULTILINE)
    return Part("torch with CUDA", built.group(1) if built else None)


def _gpus() -> Part:
    listed = _output(["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"])
    names = listed.splitlines() if listed else []
    return Part("NVIDIA GPU", f"{len(names)} x {names[0]}" if names else None)


def _output(command: list[str]) -> str | None:
    """What a command prints; None if it is not there, fails or hangs."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
