"""`nemo-disco doctor`: versions of this machine's parts, and for each feature the parts that it lacks here.

Reads package metadata and files and runs commands, but imports none of the parts: Transformer Engine is imported in
another process, since a broken one makes megatron-core fail. Must not import torch.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from packaging.version import Version
from rich.console import Console
from rich.table import Table
from rich.text import Text

import nemo_disco
from nemo_disco.config.paths import packaged_directory
from nemo_disco.config.safe_yaml import read_yaml
from nemo_disco.models.architecture import ARCHITECTURES
from nemo_disco.runtime.host import total_memory
from nemo_disco.runtime.rundir import HOST, RunDirectory
from nemo_disco.runtime.saved_files import read_json_lines, read_text

# Versions of each distribution that nemo_disco works with: [at least, below).
PACKAGES: dict[str, tuple[str, str] | None] = {
    "torch": ("2.11", "2.14"),
    "megatron-core": ("0.16.1", "0.17"),
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
# Versions that all tests ran with, where that range is narrower: [at least, below).
TESTED = {"torch": ("2.13", "2.14")}
TRAINING = ("torch", "megatron-core", "psutil", "transformers")
# Environment variables of a report. No prefix here has secrets; SLURM's have (SLURM_JWT), and names of users and hosts.
_REPORTED = re.compile(
    r"(CUDA|NVIDIA|NCCL|GLOO|UCX|FI|TORCH|PYTORCH|TRITON|NVTE|OMP|MKL|KMP|MALLOC)_\w+|LD_(PRELOAD|LIBRARY_PATH)"
    r"|PYTHONPATH|(LOCAL_|GROUP_)?RANK|(LOCAL_)?WORLD_SIZE|SLURM_(JOB_NUM_NODES|NTASKS|NTASKS_PER_NODE|CPUS_PER_TASK"
    r"|GPUS_PER_NODE|GPUS_ON_NODE|MEM_PER_NODE|CPU_BIND|PROCID|LOCALID|RESTART_COUNT)"
)


@dataclass(frozen=True)
class Part:
    """A package, program or device. detail: its version or a description; None if this machine lacks it."""

    name: str
    detail: str | None
    problem: str = ""  # why it cannot be used although it is there
    note: str = ""  # a warning about a part that can be used

    @property
    def usable(self) -> bool:
        return self.detail is not None and not self.problem

    @property
    def colour(self) -> str:
        return "red" if self.problem else "yellow" if self.note else "" if self.detail else "dim"


@dataclass(frozen=True)
class Feature:
    """Something that nemo_disco can do if no part is missing. required: every run depends on it."""

    name: str
    missing: str
    required: bool = False


Rows = list[tuple[str, str, str]]  # name, text and colour


def main(options: argparse.Namespace) -> int:
    """Print the tables, or with --report the report; 1 if this machine lacks a part that every run needs."""
    parts = examine()
    features = list_features(parts)
    tables = {
        "this machine": [
            (p.name, f"{p.detail or '-'} {p.problem or p.note}".strip(), p.colour) for p in parts.values()
        ],
        "what it can do": [
            (f.name, *((f"no: {f.missing}", "yellow") if f.missing else ("yes", "green"))) for f in features
        ],
    }
    if options.report is None:
        print_tables(tables)
    else:
        print(format_report(tables, options.report))
    return int(any(feature.required and feature.missing for feature in features))


def print_tables(tables: Mapping[str, Rows]) -> None:
    for title, rows in tables.items():
        table = Table(title=title, title_justify="left", show_header=False)
        for name, text, colour in rows:
            table.add_row(name, Text(text, colour))
        Console().print(table)


def format_report(tables: Mapping[str, Rows], runs: Iterable[Path]) -> str:
    """Markdown for an issue: tables, environment variables, each run's config.yaml and last line of metrics.jsonl.

    ~, USER and HOST stand for the home directory and for this user's and host's names. Raises FileError.
    """
    variables = [(name, value, "") for name, value in sorted(os.environ.items()) if _REPORTED.fullmatch(name)]
    sections = []
    for title, rows in {**tables, "environment variables": variables or [("none", "", "")]}.items():
        cells = [re.sub(r"([|<\\`*])", r"\\\1", f"{name}\0{text}").split("\0") for name, text, _ in rows]
        lines = [f"| {name} | {' '.join(text.split())} |" for name, text in cells]
        sections += [f"### {title.capitalize()}", "\n".join(["| | |", "| --- | --- |", *lines])]
    for run in map(RunDirectory, runs):
        last = "no step is finished"
        for line in read_json_lines(run.metrics, dict) if run.metrics.exists() else ():
            last = line.raw.decode(errors="replace")
        for name, text in (("config.yaml", read_text(run.config)), ("last line of metrics.jsonl", last)):
            sections += [f"### {run.path}: {name}", f"````\n{text.rstrip()}\n````"]
    text = "\n\n".join(sections)
    home = os.path.expanduser("~")
    users = {os.environ.get("USER"), os.environ.get("LOGNAME"), Path(home).name} - {"root"}
    for private, public in ((home, "~"), (HOST, "HOST"), *((user, "USER") for user in users)):
        if private and private != "/":
            text = re.sub(rf"(?<!\w){re.escape(private)}(?!\w)", public, text)
    return text


def examine() -> dict[str, Part]:
    """All parts, by name."""
    root = Path(nemo_disco.__file__).parents[1]
    commit = _output(["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    processor = _first_match(Path("/proc/cpuinfo"), r"^model name\s*: (.+)$") or platform.machine()
    parts = [
        Part(
            "nemo_disco", nemo_disco.__version__ + (f", commit {commit}" if commit and (root / ".git").exists() else "")
        ),
        Part("Python", platform.python_version()),
        Part("operating system", platform.platform()),
        Part("CPU", f"{cores} cores, {processor}, {total_memory() / 2**30:.0f} GiB memory"),
        _gpus(),
        _cuda_build(),
        *(_package(name, bounds) for name, bounds in PACKAGES.items()),
        *(Part(f"{name}'s Python", path if shutil.which(path) else None) for name, path in engine_pythons().items()),
        Part("SLURM", _output(["srun", "--version"])),
    ]
    return {part.name: part for part in parts}


@functools.cache
def engine_pythons() -> dict[str, str]:
    """Engine -> the Python of its own environment, if it has one, by conf/generation/ (docs/engines.md)."""
    settings = map(read_yaml, sorted((packaged_directory("conf") / "generation").glob("*.yaml")))
    return {values["engine"]: values["python"] for values in settings if values.get("python")}


def list_features(parts: Mapping[str, Part]) -> list[Feature]:
    """All features, each with the names of its parts that these lack."""
    gpu = ("NVIDIA GPU", "torch with CUDA")
    fused = any(parts[name].usable for name in ("transformer-engine", "apex"))
    return [
        Feature("train on the CPU (gloo)", _missing(parts, TRAINING), required=True),
        Feature("parts for training on GPUs (NCCL, BF16)", _missing(parts, (*TRAINING, *gpu))),
        Feature(f"models: {', '.join(ARCHITECTURES)}", _missing(parts, TRAINING), required=True),
        Feature("attention on packed sequences (SDPA)", _missing(parts, ("torch",))),
        Feature("flash attention on packed sequences (BF16)", _missing(parts, ("torch", *gpu))),
        Feature("fused optimizer and norms", "" if fused else "transformer-engine or apex; torch's own are used"),
        Feature("FP8 and Transformer Engine layers", _missing(parts, ("transformer-engine", *gpu))),
        Feature("engine megatron", _missing(parts, TRAINING), required=True),
        *(Feature(f"engine {name}", _missing(parts, (f"{name}'s Python",))) for name in engine_pythons()),
        Feature("grade mathematics", _missing(parts, ("math-verify", "antlr4-python3-runtime")), required=True),
        Feature("Parquet question files", _missing(parts, ("pyarrow",))),
        Feature("TensorBoard", _missing(parts, ("tensorboard",))),
        Feature("Weights & Biases", _missing(parts, ("wandb",))),
        Feature("several nodes under SLURM", _missing(parts, ("SLURM",))),
    ]


def _missing(parts: Mapping[str, Part], names: Iterable[str]) -> str:
    unusable = [parts[name] for name in names if not parts[name].usable]
    return ", ".join(f"{part.name} ({part.problem})" if part.problem else part.name for part in unusable)


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
    """Import an installed module in another process; return why that fails, or an empty string.

    Transformer Engine without cuDNN raises RuntimeError, where megatron-core catches only ImportError.
    """
    try:
        result = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return f"import {module} does not end"
    if result.returncode == 0:
        return ""
    last = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
    return f"does not import ({last}), and megatron-core fails with it: mend it or uninstall it"


def _cuda_build() -> Part:
    """The CUDA version that torch was built for, read from its version.py without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return Part("torch with CUDA", None)
    source = Path(spec.origin).parent / "version.py"
    return Part("torch with CUDA", _first_match(source, r"^cuda\b.*=\s*['\"](.+?)['\"]"))


def _gpus() -> Part:
    """Name, memory and driver of the GPUs, each kind with its count."""
    listed = _output(["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]) or ""
    kinds = Counter(listed.splitlines())
    return Part("NVIDIA GPU", "; ".join(f"{count} x {kind}" for kind, count in kinds.items()) or None)


def _first_match(file: Path, pattern: str) -> str | None:
    """The pattern's first group where a line of the file first matches; None without a match or a file."""
    match = re.search(pattern, file.read_text(), re.MULTILINE) if file.is_file() else None
    return match.group(1) if match else None


def _output(command: list[str]) -> str | None:
    """Standard output of a command; None if it is not installed, fails or takes over 20 s."""
    if shutil.which(command[0]) is None:
        return None
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return None
    return result.stdout.strip() or None if result.returncode == 0 else None
