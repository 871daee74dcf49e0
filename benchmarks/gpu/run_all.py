"""Measure the GPU path: one command, under eight minutes, JSON and a table.

    python benchmarks/gpu/run_all.py [--output benchmarks/gpu/results/NAME.json] [--only SECTION ...] [--tiny]

Correctness and the machine's floors first. Every section is a process of its own with a time limit: an error, a hang or
memory that does not suffice is recorded, and the others go on. The file is written anew after each. One that is there
already is read first, so that --only compares with what ran before on the same device. Each figure is divided by the
floor that counts.py counts for it. --tiny goes through every section on a CPU at toy sizes, to know that the program
runs; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from counts import over_floors
from section import SECTIONS
from setting import Setting, lookup

HERE = Path(__file__).parent
# In all, and less of it than this is not worth a start.
BUDGET_S, LEAST_S = 475, 15
TINY_LIMIT_S = 600
# Key, what it should be, and whether it is a least or a most.
TARGETS = (
    ("correctness.passed", 1.0, "least"),
    ("train_1p5b_8k.mfu", 0.45, "least"),
    ("train_1p5b_8k.times_unpadded_transformers", 1.5, "least"),
    ("log_probs.kernel.times_the_roofline", 2.0, "most"),
    ("decode.in_place.times_the_bandwidth_floor", 2.0, "most"),
    ("log_probs.kernel.extra_peak_gb", 1.0, "most"),
    ("log_probs.kernel.error_against_float32", 2e-3, "most"),
    ("step.exact_pass_share", 0.25, "most"),
)


def main() -> None:
    args = arguments()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    results = resumed(about(args.tiny), args.output)
    started = time.monotonic()
    for name in args.only or SECTIONS:
        left = BUDGET_S - (time.monotonic() - started)
        # Toy sizes are for any machine, however busy.
        limit = TINY_LIMIT_S if args.tiny else min(SECTIONS[name][1], left)
        results[name] = run(name, results, limit, args)
        compare(results, args.tiny)
        args.output.write_text(json.dumps(results, indent=1) + "\n")
        said = results[name].get("error", "done")
        print(f"{name:22} {results[name]['section_seconds']:6.1f} s  {said.splitlines()[-1][:150]}", flush=True)
    print(table(results))
    print(f"written to {args.output}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE / "results" / f"{datetime.now(UTC):%Y-%m-%d}.json")
    parser.add_argument("--only", nargs="+", choices=SECTIONS)
    parser.add_argument("--tiny", action="store_true")
    return parser.parse_args()


def resumed(about: dict[str, Any], output: Path) -> dict[str, Any]:
    """The results to go on with: of the file that is there, if it is of the same device, else none. Exits where the
    file is of another device or size, which must not be mixed with this one's."""
    if not output.exists():
        return {"about": about}
    results: dict[str, Any] = json.loads(output.read_text())
    before = results["about"]
    if (before["device"], before["tiny"]) != (about["device"], about["tiny"]):
        sys.exit(f"error: {output} is of {before['device']} (tiny: {before['tiny']}); name another file by --output")
    earlier = [*before.pop("earlier", []), {"date": before["date"], "command": before.get("command")}]
    return results | {"about": about | {"earlier": earlier}}


def run(name: str, results: Mapping[str, Any], limit_s: float, args: argparse.Namespace) -> dict[str, Any]:
    """The section's result, or {"error": ...}, with its seconds."""
    start = time.monotonic()
    if limit_s < LEAST_S:
        return {"error": "no time was left for it", "section_seconds": 0.0}
    seen = args.output.with_suffix(".so_far.json")
    seen.write_text(json.dumps(results))
    command = [sys.executable, str(HERE / "section.py"), name, f"--results={seen}", *(["--tiny"] if args.tiny else [])]
    environment = os.environ | {
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "TOKENIZERS_PARALLELISM": "false",
    }
    try:
        found = outcome(run_within(command, limit_s, environment))
    except subprocess.TimeoutExpired as expired:
        late = {"error": f"not done after {limit_s:.0f} s; {_tail(expired.stderr)}"}
        found = (_last_result(str(expired.stdout or "")) or {}) | late
    finally:
        seen.unlink()
    return found | {"section_seconds": time.monotonic() - start, "date": _now()}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def run_within(command: list[str], limit_s: float, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """subprocess.run, but that whatever the command started ends with it (torch.compile's workers would hold its pipes
    open, and the device's memory). Raises TimeoutExpired."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, env=environment, start_new_session=True)
        try:
            process.wait(limit_s)
            late = False
        except subprocess.TimeoutExpired:
            late = True
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        said = []
        for file in (out, err):
            file.seek(0)
            said.append(file.read())
    if late:
        raise subprocess.TimeoutExpired(command, limit_s, *said)
    return subprocess.CompletedProcess(command, process.returncode, *said)


def outcome(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The section's last line, whatever its process's end was: it is printed when all is measured."""
    if (found := _last_result(done.stdout)) is not None:
        return found if done.returncode == 0 else found | {"exit_code": done.returncode}
    return {"error": f"exit code {done.returncode}\n{_tail(done.stderr)}"}


def _last_result(stdout: str) -> dict[str, Any] | None:
    """The JSON object of the last line, if it is one."""
    lines = stdout.strip().splitlines()
    if lines and lines[-1].startswith("{"):
        with suppress(ValueError):
            found: dict[str, Any] = json.loads(lines[-1])
            return found
    return None


def _tail(text: str | bytes | None) -> str:
    said = text.decode(errors="replace") if isinstance(text, bytes) else text or ""
    return said.strip()[-4000:]


def compare(results: dict[str, Any], tiny: bool) -> None:
    """Every figure over its floor, our tokens a second over the baselines', and whether each way that was timed is
    right, once both are there."""
    over = over_floors(Setting(tiny, results), results["about"]["device"], results)
    results["over_floors"] = over
    for way, name in (
        ("log_probs.kernel.forward_backward_s", "times_the_roofline"),
        ("decode.in_place.seconds_a_step", "times_the_bandwidth_floor"),
    ):
        if (times := over.get(way, {}).get("times_measured_floor")) is not None:
            section, kind, _ = way.split(".")
            results[section][kind][name] = times
    ours = results.get("train_1p5b_8k", {})
    for kind in ("padded", "unpadded"):
        theirs = results.get(f"baseline_{kind}", {}).get("tokens_per_second")
        if theirs and "tokens_per_second" in ours:
            ours[f"times_{kind}_transformers"] = ours["tokens_per_second"] / theirs
    for way, errors in results.get("correctness", {}).get("ways", {}).items():
        section, name = way.split(".")
        if name in results.get(section, {}):
            results[section][name]["right"] = errors["right"]


def about(tiny: bool) -> dict[str, Any]:
    import torch

    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    versions = {}
    for package in ("torch", "triton", "megatron-core", "transformers", "transformer-engine", "apex"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "date": _now(),
        "command": " ".join(["python3", *sys.argv]),
        "tiny": tiny,
        "device": "cpu" if gpu is None else gpu.name,
        "memory_gb": None if gpu is None else gpu.total_memory / 1e9,
        "python": platform.python_version(),
        "versions": versions,
    }


def table(results: Mapping[str, Any]) -> str:
    lines = [f"{'key':45}{'found':>12}{'target':>14}"]
    for key, target, kind in TARGETS:
        value = lookup(results, key)
        sign = ">=" if kind == "least" else "<="
        held = "" if value is None else "  yes" if (value >= target) == (kind == "least") or value == target else "  NO"
        found = "-" if value is None else f"{value:.4g}"
        lines.append(f"{key:45}{found:>12}{f'{sign} {target:g}':>14}{held}")
    for way, found in results.get("correctness", {}).get("ways", {}).items():
        said = "right" if found["right"] else f"WRONG {found.get('error', '')[:90]}"
        worst = "-" if "error" in found else f"{found['times_bound']:.3g}"
        lines.append(f"{way + ': error over its bound':45}{worst:>12}{'<= 1':>14}  {said}")
    for key in SHOWN:
        if (value := lookup(results, key)) is not None:
            lines.append(f"{key:45}{value:>12.4g}{judged(results, key)}")
    lines.append(f"{'seconds, over the floor':45}{'seconds':>12}{'datasheet':>14}{'measured':>12}")
    for key, figures in results.get("over_floors", {}).items():
        times = [figures.get(f"times_{kind}_floor") for kind in ("datasheet", "measured")]
        cells = ["-" if value is None else f"{value:.3g}" for value in times]
        line = f"{key:45}{figures['seconds']:>12.4g}{cells[0]:>14}{cells[1]:>12}"
        lines.append(line + judged(results, key))
    return "\n".join(lines)


def judged(results: Mapping[str, Any], key: str) -> str:
    """The mark behind a figure of one of several ways: none where `correctness` found that it is right."""
    section, *rest = key.split(".")
    if section not in ("log_probs", "attention", "decode"):
        return ""
    right = results.get(section, {}).get(rest[0], {}).get("right")
    return "" if right else "  unchecked" if right is None else "  WRONG"


SHOWN = (
    *("floors.matrix_flops", "floors.copy_bytes_per_second"),
    *("train_1p5b_8k.mfu_of_measured", "train_1p5b_8k.tokens_per_second", "train_1p5b_8k.peak_gb"),
    *("train_1p5b_8k.times_padded_transformers", "train_1p5b_8k_local.mfu"),
    *("train_7b_8k.mfu", "train_7b_8k.tokens_per_second", "train_7b_8k.peak_gb"),
    *("train_1p5b_8k_long.mfu", "train_qwen3_0p6b_16k.mfu", "train_qwen3_0p6b_16k.tokens_per_second"),
    *("train_qwen3_0p6b_65k.mfu", "train_qwen3_0p6b_65k.tokens_per_second", "train_qwen3_0p6b_65k.peak_gb"),
    *(f"log_probs.{way}.forward_backward_s" for way in ("tokens_first", "splits_first", "wide_backward")),
    "log_probs.tiled.extra_peak_gb",
    *(f"attention.{way}.error_against_float32" for way in ("packed", "alone")),
    *("decode.in_place.tokens_per_second", "decode.plain.tokens_per_second"),
    *("decode.in_place_with_cudnn.tokens_per_second", "decode.plain_with_cudnn.tokens_per_second"),
    *("step.seconds.step", "step.seconds.pass1", "step.offload_seconds", "step.peak_gb"),
)


if __name__ == "__main__":
    main()
