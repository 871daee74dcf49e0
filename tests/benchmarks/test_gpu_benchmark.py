"""The GPU benchmark runs to its end on a CPU at toy sizes, and records a failure of one section or variant."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

GPU = Path(__file__).parents[2] / "benchmarks" / "gpu"
sys.path.insert(0, str(GPU))

import attention_variants  # noqa: E402 - a script's directory, not a package
import decoding  # noqa: E402
import heads  # noqa: E402
import learning  # noqa: E402
import run_all  # noqa: E402
import section  # noqa: E402
import variant_errors  # noqa: E402
from setting import Setting, model_directory, override_attributes  # noqa: E402

from nemo_disco.policy import log_probs  # noqa: E402


def run(script: str, output: Path, *options: str) -> dict[str, Any]:
    """The results that a script of the benchmark writes at toy sizes."""
    command = [sys.executable, str(GPU / script), "--tiny", f"--output={output}", *options]
    subprocess.run(command, check=True, capture_output=True)
    results: dict[str, Any] = json.loads(output.read_text())
    return results


def test_a_section_finds_what_those_before_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--tiny", f"--output={tmp_path}/out.json", "--only", "floors", "log_probs"]
    monkeypatch.setattr(sys, "argv", ["run_all.py", *options])
    run_all.main()
    results = json.loads((tmp_path / "out.json").read_text())
    assert results["about"]["tiny"] is True
    assert results["floors"]["matrix_flops"] > 0
    assert results["over_floors"]["log_probs.tiled.forward_backward_s"]["times_measured_floor"] > 0
    assert results["log_probs"]["tiled"]["error_against_float32"] < 1e-2
    assert results["log_probs"]["likely_tokens"]["kl_error_against_float32"] < 0.1
    assert list(tmp_path.iterdir()) == [tmp_path / "out.json"]


def test_results_of_an_earlier_run_are_kept(tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    before = {"date": "2026-12-01", "device": "cpu", "tiny": True, "command": "first"}
    output.write_text(json.dumps({"about": before, "floors": {"matrix_flops": 5.0}}))
    results = run_all.resume_results({"date": "2026-12-02", "device": "cpu", "tiny": True, "command": "second"}, output)
    assert results["floors"] == {"matrix_flops": 5.0}
    assert results["about"]["earlier"] == [{"date": "2026-12-01", "command": "first"}]
    with pytest.raises(SystemExit, match="name another file by --output"):
        run_all.resume_results({"date": "2026-12-02", "device": "NVIDIA H200", "tiny": True}, output)
    assert run_all.resume_results(before, tmp_path / "none.json") == {"about": before}


def test_a_result_survives_its_process() -> None:
    """NCCL or CUDA may end a process by a signal after the section has printed its result."""
    code = "import os, sys; print('{\"a\": 1}', flush=True); os.abort()"
    process = run_all.run_within([sys.executable, "-c", code], 60.0, os.environ)
    assert run_all.read_outcome(process) == {"a": 1, "exit_code": -6}
    process.stdout = '{"a": 1'
    assert "error" in run_all.read_outcome(process)


def test_a_wrong_variant_is_shown_as_wrong_whatever_its_speed() -> None:
    variants = {"log_probs.fused_sum": {"weight_gradient": 1.0, "times_bound": 50.0, "right": False}}
    variants["log_probs.kernel"] = {"weight_gradient": 1e-3, "times_bound": 0.1, "right": True}
    variants["decode.plain"] = {"error": "RuntimeError: no kernel", "right": False}
    fast = {"forward_backward_s": 1e-3}
    results = {"about": {"device": "NVIDIA H200"}, "correctness": {"ways": variants}}
    results["log_probs"] = {"tokens": 8, "kernel": dict(fast), "fused_sum": dict(fast), "tiled": dict(fast)}
    run_all.add_comparisons(results, tiny=False)
    lines = {line.split()[0]: line for line in run_all.render_table(results).splitlines()}
    assert lines["log_probs.fused_sum.forward_backward_s"].endswith("WRONG")
    assert lines["log_probs.tiled.forward_backward_s"].endswith("unchecked")
    assert "WRONG" not in lines["log_probs.kernel.forward_backward_s"]
    assert lines["log_probs.fused_sum:"].split()[-1] == "WRONG" and lines["log_probs.kernel:"].endswith("right")
    assert "WRONG RuntimeError: no kernel" in lines["decode.plain:"]


def test_every_variant_that_is_timed_is_compared_with_float64() -> None:
    """A variant that overwrites a sum instead of adding to it is reported as wrong."""
    setting = Setting(tiny=True, results={})
    with model_directory(setting.shape("1p5b"), scale=0.05) as path:
        variants = variant_errors.run(setting, path)
        timed = {
            "log_probs": heads.make_variants(),
            "attention": attention_variants.make_variants(),
            "decode": decoding.VARIANTS,
        }
        assert variants.keys() == {f"{part}.{name}" for part, names in timed.items() for name in names}
        assert all(variant["right"] for variant in variants.values()), variants
        with override_attributes(log_probs, _add_product=lambda total, a, b: total.copy_(a @ b)):
            overwritten = variant_errors.run(setting, path)
    assert {name for name, variant in overwritten.items() if not variant["right"]} == {"log_probs.tiled"}


def has_ended(pid: int, within_s: float) -> bool:
    """True as soon as the process is gone or a zombie; False if it still runs after about `within_s` seconds."""
    for _ in range(int(within_s / 0.1)):
        stat = Path(f"/proc/{pid}/stat")
        with suppress(FileNotFoundError, ProcessLookupError):
            if stat.read_text().rpartition(")")[2].split()[0] != "Z":
                time.sleep(0.1)
                continue
        return True
    return False


@pytest.mark.slow
def test_every_section_runs(tmp_path: Path) -> None:
    results = run("run_all.py", tmp_path / "out.json")
    assert {name: results[name].get("error") for name in section.SECTIONS} == dict.fromkeys(section.SECTIONS)
    assert results["correctness"]["passed"], results["correctness"]["within_bounds"]
    for part in ("log_probs", "attention", "decode"):
        variants = {n for n, value in results[part].items() if isinstance(value, dict) and n != "likely_tokens"}
        assert {(name, results["correctness"]["ways"][f"{part}.{name}"]["right"]) for name in variants} == {
            (name, True) for name in variants
        }
    assert results["train_1p5b_8k"]["times_unpadded_transformers"] > 0
    assert 0 < results["step"]["exact_pass_share"] < 1


@pytest.mark.slow
def test_the_learning_run_runs(tmp_path: Path) -> None:
    results = run("learning.py", tmp_path / "out.json", "--steps=2")
    for objective in ("disco", "grpo"):
        assert results[objective]["error"] is None
        assert len(results[objective]["curves"]["reward/mean"]) == 2
        assert results[objective]["evaluations"].keys() == {"0", "1", "2"}


@pytest.mark.parametrize(
    ("recipe", "limit_s", "error"),
    [
        ({"stop_at": 1.1}, 600, "RuntimeError: Pass@1 did not reach 1.1 in 2 steps"),
        ({"max_steps": 10_000, "check_from": 10_000}, 10, "TimeoutError: not done after 10 s"),
    ],
)
def test_a_warm_start_that_falls_short_leaves_its_model(
    recipe: dict[str, Any], limit_s: int, error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learning, "TINY_RECIPE", replace(learning.TINY_RECIPE, **recipe))
    monkeypatch.setattr(learning, "WARM_START_LIMIT_S", limit_s)
    assert learning.make_model(tmp_path, tiny=True)["warm_start_error"] == error
    weights = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    start = learning.build_random_model(AutoTokenizer.from_pretrained(tmp_path), tiny=True).state_dict()
    assert all(value.isfinite().all() for value in weights.values())
    assert any(not weights[name].equal(value) for name, value in start.items())
    assert json.loads((tmp_path / "tokenizer.json").read_text())["padding"] is None


def test_the_sections_fit_into_eight_minutes() -> None:
    assert run_all.BUDGET_S < 480
    for name in section.SECTIONS:
        assert callable(section.load_section(name)), name


def test_errors_and_hangs_are_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = subprocess.CompletedProcess([], 1, stdout="", stderr="Traceback\nOutOfMemoryError: no")
    assert run_all.read_outcome(process) == {"error": "exit code 1\nTraceback\nOutOfMemoryError: no"}
    assert "error" in run_all.read_outcome(subprocess.CompletedProcess([], 0, stdout="", stderr=""))
    monkeypatch.setattr(run_all, "LEAST_S", 0)
    args = argparse.Namespace(output=tmp_path / "out.json", tiny=True)
    assert run_all.run_section("floors", {}, 0.05, args)["error"].startswith("not done after 0 s")
    monkeypatch.setattr(run_all, "LEAST_S", 15)
    assert run_all.run_section("floors", {}, 1.0, args)["error"] == "not started, because no time was left"


def test_processes_that_a_section_started_end_with_it(tmp_path: Path) -> None:
    """Such a process keeps the section's pipes open, so that reading them to their end would never return."""
    pid_file = tmp_path / "pid"
    for last_command, times_out in (("sleep 600", True), ("echo {}", False)):
        command = ["sh", "-c", f"sleep 600 & echo $! > {pid_file}; {last_command}"]
        start = time.monotonic()
        if times_out:
            with pytest.raises(subprocess.TimeoutExpired):
                run_all.run_within(command, 2.0, os.environ)
        else:
            assert run_all.read_outcome(run_all.run_within(command, 60.0, os.environ)) == {}
        assert time.monotonic() - start < 60
        assert has_ended(int(pid_file.read_text()), within_s=30)
        pid_file.unlink()


def test_the_table_says_which_targets_are_met() -> None:
    results = {"train_1p5b_8k": {"mfu": 0.46, "tokens_per_second": 30.0}, "step": {"exact_pass_share": 0.3}}
    results["baseline_unpadded"] = {"tokens_per_second": 20.0}
    results["about"] = {"device": "cpu"}
    run_all.add_comparisons(results, tiny=False)
    lines = {line.split()[0]: line for line in run_all.render_table(results).splitlines()}
    assert lines["train_1p5b_8k.mfu"].endswith("yes")
    assert lines["train_1p5b_8k.times_unpadded_transformers"].endswith("yes")
    assert lines["step.exact_pass_share"].endswith("NO")
    assert lines["correctness.passed"].split()[1] == "-"
