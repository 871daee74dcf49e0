"""Measure training and sampling on a GPU with one command, in under eight minutes; writes JSON and prints a table.

    python benchmarks/gpu/run_all.py [--output benchmarks/gpu/results/NAME.json] [--only SECTION ...] [--tiny]

Each section is a process of its own with a time limit; the machine's rates and correctness come first. An error, a hang
or a lack of memory is recorded, and the next section starts. The file is rewritten after each section. If it exists at
the start, its results are kept, so that --only compares with earlier sections on the same device. Measured times are
divided by the floors of counts.py. --tiny runs every section at toy sizes, also on a CPU, to test the program; its
figures mean nothing.
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

from counts import divide_by_floors
from section import SECTIONS
from setting import Setting, look_up

HERE = Path(__file__).parent
# Seconds of all sections together; with less than LEAST_S of them left, no section is started.
BUDGET_S, LEAST_S = 475, 15
TINY_LIMIT_S = 600
# Key of a figure, its target, and whether the figure should be at least or at most that.
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
    args = parse_arguments()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    results = resume_results(describe_run(args.tiny), args.output)
    started = time.monotonic()
    for name in args.only or SECTIONS:
        remaining_s = BUDGET_S - (time.monotonic() - started)
        # Toy sizes run in tests, on machines that may be busy: no budget, and a generous limit.
        limit_s = TINY_LIMIT_S if args.tiny else min(SECTIONS[name][1], remaining_s)
        results[name] = run_section(name, results, limit_s, args)
        add_comparisons(results, args.tiny)
        args.output.write_text(json.dumps(results, indent=1) + "\n")
        status = results[name].get("error", "done")
        print(f"{name:22} {results[name]['section_seconds']:6.1f} s  {status.splitlines()[-1][:150]}", flush=True)
    print(render_table(results))
    print(f"written to {args.output}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE / "results" / f"{datetime.now(UTC):%Y-%m-%d}.json")
    parser.add_argument("--only", nargs="+", choices=SECTIONS)
    parser.add_argument("--tiny", action="store_true")
    return parser.parse_args()


def resume_results(about: dict[str, Any], output: Path) -> dict[str, Any]:
    """The results in the output file, if it exists, with `about` as the description of the present run.

    Exits if they are from another device or size, because they must not be mixed with this run's.
    """
    if not output.exists():
        return {"about": about}
    results: dict[str, Any] = json.loads(output.read_text())
    before = results["about"]
    if (before["device"], before["tiny"]) != (about["device"], about["tiny"]):
        sys.exit(
            f"error: {output} has results of {before['device']} (tiny: {before['tiny']}); name another file by --output"
        )
    earlier = [*before.pop("earlier", []), {"date": before["date"], "command": before.get("command")}]
    return results | {"about": about | {"earlier": earlier}}


def run_section(name: str, results: Mapping[str, Any], limit_s: float, args: argparse.Namespace) -> dict[str, Any]:
    """The section's result or {"error": ...}, with its seconds and, if it ran, the date.

    results: those of earlier sections.
    """
    start = time.monotonic()
    if limit_s < LEAST_S:
        return {"error": "not started, because no time was left", "section_seconds": 0.0}
    earlier = args.output.with_suffix(".so_far.json")
    earlier.write_text(json.dumps(results))
    command = [
        sys.executable,
        str(HERE / "section.py"),
        name,
        f"--results={earlier}",
        *(["--tiny"] if args.tiny else []),
    ]
    environment = os.environ | {
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "TOKENIZERS_PARALLELISM": "false",
    }
    try:
        result = read_outcome(run_within(command, limit_s, environment))
    except subprocess.TimeoutExpired as expired:
        error = {"error": f"not done after {limit_s:.0f} s; {_tail(expired.stderr)}"}
        result = (_parse_last_line(str(expired.stdout or "")) or {}) | error
    finally:
        earlier.unlink()
    return result | {"section_seconds": time.monotonic() - start, "date": _now()}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def run_within(command: list[str], limit_s: float, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a command as subprocess.run does, and at its end or at the limit kill all processes that it started.

    torch.compile's workers, for one, would keep its pipes open and the device's memory occupied. Raises TimeoutExpired.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, env=environment, start_new_session=True)
        try:
            process.wait(limit_s)
            timed_out = False
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        outputs = []
        for file in (out, err):
            file.seek(0)
            outputs.append(file.read())
    if timed_out:
        raise subprocess.TimeoutExpired(command, limit_s, *outputs)
    return subprocess.CompletedProcess(command, process.returncode, *outputs)


def read_outcome(process: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The result on the last line of a section's output, or {"error": ...} if there is none.

    A result counts even if the process then failed (`exit_code`), because it is printed after all measurements.
    """
    if (result := _parse_last_line(process.stdout)) is not None:
        return result if process.returncode == 0 else result | {"exit_code": process.returncode}
    return {"error": f"exit code {process.returncode}\n{_tail(process.stderr)}"}


def _parse_last_line(stdout: str) -> dict[str, Any] | None:
    """The JSON object on the last line; None if it is something else."""
    lines = stdout.strip().splitlines()
    if lines and lines[-1].startswith("{"):
        with suppress(ValueError):
            result: dict[str, Any] = json.loads(lines[-1])
            return result
    return None


def _tail(text: str | bytes | None) -> str:
    decoded = text.decode(errors="replace") if isinstance(text, bytes) else text or ""
    return decoded.strip()[-4000:]


def add_comparisons(results: dict[str, Any], tiny: bool) -> None:
    """Add to the results: times over their floors, the training step's speed over the baselines', and `right`.

    `right` is added to each variant that was timed, and says whether `correctness` found its errors within bounds. A
    comparison is made once the sections that it needs have run.
    """
    over = divide_by_floors(Setting(tiny, results), results["about"]["device"], results)
    results["over_floors"] = over
    for key, name in (
        ("log_probs.kernel.forward_backward_s", "times_the_roofline"),
        ("decode.in_place.seconds_a_step", "times_the_bandwidth_floor"),
    ):
        if (times := over.get(key, {}).get("times_measured_floor")) is not None:
            section, variant, _ = key.split(".")
            results[section][variant][name] = times
    train = results.get("train_1p5b_8k", {})
    for kind in ("padded", "unpadded"):
        baseline = results.get(f"baseline_{kind}", {}).get("tokens_per_second")
        if baseline and "tokens_per_second" in train:
            train[f"times_{kind}_transformers"] = train["tokens_per_second"] / baseline
    for key, errors in results.get("correctness", {}).get("ways", {}).items():
        section, variant = key.split(".")
        if variant in results.get(section, {}):
            results[section][variant]["right"] = errors["right"]


def describe_run(tiny: bool) -> dict[str, Any]:
    """The date, command, device and versions of this run: `about` in the results."""
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


def render_table(results: Mapping[str, Any]) -> str:
    """The printed table: figures with targets, errors of the variants, other figures, and times over their floors."""
    lines = [f"{'key':45}{'value':>12}{'target':>14}"]
    for key, target, kind in TARGETS:
        value = look_up(results, key)
        sign = ">=" if kind == "least" else "<="
        mark = "" if value is None else "  yes" if (value >= target) == (kind == "least") or value == target else "  NO"
        cell = "-" if value is None else f"{value:.4g}"
        lines.append(f"{key:45}{cell:>12}{f'{sign} {target:g}':>14}{mark}")
    for key, errors in results.get("correctness", {}).get("ways", {}).items():
        mark = "right" if errors["right"] else f"WRONG {errors.get('error', '')[:90]}"
        worst = "-" if "error" in errors else f"{errors['times_bound']:.3g}"
        lines.append(f"{key + ': error over its bound':45}{worst:>12}{'<= 1':>14}  {mark}")
    for key in FIGURES:
        if (value := look_up(results, key)) is not None:
            lines.append(f"{key:45}{value:>12.4g}{correctness_mark(results, key)}")
    lines.append(f"{'seconds, over the floor':45}{'seconds':>12}{'datasheet':>14}{'measured':>12}")
    for key, figures in results.get("over_floors", {}).items():
        times = [figures.get(f"times_{kind}_floor") for kind in ("datasheet", "measured")]
        cells = ["-" if value is None else f"{value:.3g}" for value in times]
        line = f"{key:45}{figures['seconds']:>12.4g}{cells[0]:>14}{cells[1]:>12}"
        lines.append(line + correctness_mark(results, key))
    return "\n".join(lines)


def correctness_mark(results: Mapping[str, Any], key: str) -> str:
    """The mark behind a figure of a variant: WRONG if its errors are too large, unchecked if none were measured."""
    section, *rest = key.split(".")
    if section not in ("log_probs", "attention", "decode"):
        return ""
    right = results.get(section, {}).get(rest[0], {}).get("right")
    return "" if right else "  unchecked" if right is None else "  WRONG"


# Figures without a target that the table shows too.
FIGURES = (
    *("floors.matrix_flops", "floors.copy_bytes_per_second"),
    *("train_1p5b_8k.mfu_of_measured", "train_1p5b_8k.tokens_per_second", "train_1p5b_8k.peak_gb"),
    *("train_1p5b_8k.times_padded_transformers", "train_1p5b_8k_local.mfu"),
    *("train_7b_8k.mfu", "train_7b_8k.tokens_per_second", "train_7b_8k.peak_gb"),
    *("train_1p5b_8k_long.mfu", "train_qwen3_0p6b_16k.mfu", "train_qwen3_0p6b_16k.tokens_per_second"),
    *("train_qwen3_0p6b_65k.mfu", "train_qwen3_0p6b_65k.tokens_per_second", "train_qwen3_0p6b_65k.peak_gb"),
    *(f"log_probs.{variant}.forward_backward_s" for variant in ("tokens_first", "splits_first", "wide_backward")),
    "log_probs.tiled.extra_peak_gb",
    *(f"attention.{variant}.error_against_float32" for variant in ("packed", "alone")),
    *("decode.in_place.tokens_per_second", "decode.plain.tokens_per_second"),
    *("decode.in_place_with_cudnn.tokens_per_second", "decode.plain_with_cudnn.tokens_per_second"),
    *("step.seconds.step", "step.seconds.pass1", "step.offload_seconds", "step.peak_gb"),
)


if __name__ == "__main__":
    main()
