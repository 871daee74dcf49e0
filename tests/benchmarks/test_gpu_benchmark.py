"""The GPU benchmark runs to its end, on a CPU at toy sizes; what fails in it is recorded and stops nothing else."""

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

import attention_ways  # noqa: E402 - a script's directory, not a package
import decoding  # noqa: E402
import heads  # noqa: E402
import learning  # noqa: E402
import run_all  # noqa: E402
import section  # noqa: E402
import way_errors  # noqa: E402
from setting import Setting, changed, model_directory  # noqa: E402

from nemo_disco.policy import log_probs  # noqa: E402


def run(script: str, output: Path, *options: str) -> dict[str, Any]:
    command = [sys.executable, str(GPU / script), "--tiny", f"--output={output}", *options]
    subprocess.run(command, check=True, capture_output=True)
    found: dict[str, Any] = json.loads(output.read_text())
    return found


def test_a_section_finds_what_those_before_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--tiny", f"--output={tmp_path}/out.json", "--only", "floors", "log_probs"]
    monkeypatch.setattr(sys, "argv", ["run_all.py", *options])
    run_all.main()
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["about"]["tiny"] is True
    assert found["floors"]["matrix_flops"] > 0
    assert found["over_floors"]["log_probs.tiled.forward_backward_s"]["times_measured_floor"] > 0
    assert found["log_probs"]["tiled"]["error_against_float32"] < 1e-2
    assert list(tmp_path.iterdir()) == [tmp_path / "out.json"]


def test_results_that_are_there_are_gone_on_with(tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    before = {"date": "2026-12-01", "device": "cpu", "tiny": True, "command": "first"}
    output.write_text(json.dumps({"about": before, "floors": {"matrix_flops": 5.0}}))
    found = run_all.resumed({"date": "2026-12-02", "device": "cpu", "tiny": True, "command": "second"}, output)
    assert found["floors"] == {"matrix_flops": 5.0}
    assert found["about"]["earlier"] == [{"date": "2026-12-01", "command": "first"}]
    with pytest.raises(SystemExit, match="name another file by --output"):
        run_all.resumed({"date": "2026-12-02", "device": "NVIDIA H200", "tiny": True}, output)
    assert run_all.resumed(before, tmp_path / "none.json") == {"about": before}


def test_a_result_survives_its_process() -> None:
    """NCCL or CUDA may end a process by a signal after it has printed its result."""
    code = "import os, sys; print('{\"a\": 1}', flush=True); os.abort()"
    done = run_all.run_within([sys.executable, "-c", code], 60.0, os.environ)
    assert run_all.outcome(done) == {"a": 1, "exit_code": -6}
    done.stdout = '{"a": 1'
    assert "error" in run_all.outcome(done)


def test_a_way_that_is_wrong_is_shown_wrong_whatever_its_speed() -> None:
    ways = {"log_probs.fused_sum": {"weight_gradient": 1.0, "times_bound": 50.0, "right": False}}
    ways["log_probs.kernel"] = {"weight_gradient": 1e-3, "times_bound": 0.1, "right": True}
    ways["decode.plain"] = {"error": "RuntimeError: no kernel", "right": False}
    fast = {"forward_backward_s": 1e-3}
    results = {"about": {"device": "NVIDIA H200"}, "correctness": {"ways": ways}}
    results["log_probs"] = {"tokens": 8, "kernel": dict(fast), "fused_sum": dict(fast), "tiled": dict(fast)}
    run_all.compare(results, tiny=False)
    lines = {line.split()[0]: line for line in run_all.table(results).splitlines()}
    assert lines["log_probs.fused_sum.forward_backward_s"].endswith("WRONG")
    assert lines["log_probs.tiled.forward_backward_s"].endswith("unchecked")
    assert "WRONG" not in lines["log_probs.kernel.forward_backward_s"]
    assert lines["log_probs.fused_sum:"].split()[-1] == "WRONG" and lines["log_probs.kernel:"].endswith("right")
    assert "WRONG RuntimeError: no kernel" in lines["decode.plain:"]


def test_every_way_that_is_timed_is_compared_with_float64() -> None:
    """And a way whose sum is wrong is found out: one that forgets what it had."""
    setting = Setting(tiny=True, results={})
    with model_directory(setting.shape("1p5b"), scale=0.05) as path:
        ways = way_errors.run(setting, path)
        timed = {"log_probs": heads.ways(), "attention": attention_ways.ways(), "decode": decoding.WAYS}
        assert ways.keys() == {f"{part}.{name}" for part, names in timed.items() for name in names}
        assert all(way["right"] for way in ways.values()), ways
        with changed(log_probs, _add_product=lambda total, a, b: total.copy_(a @ b)):
            wrong = way_errors.run(setting, path)
    assert {name for name, way in wrong.items() if not way["right"]} == {"log_probs.tiled"}


def gone(pid: int, within_s: float) -> bool:
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
    found = run("run_all.py", tmp_path / "out.json")
    assert {name: found[name].get("error") for name in section.SECTIONS} == dict.fromkeys(section.SECTIONS)
    assert found["correctness"]["passed"], found["correctness"]["within_bounds"]
    for part in ("log_probs", "attention", "decode"):
        ways = {name for name, value in found[part].items() if isinstance(value, dict)}
        assert {(way, found["correctness"]["ways"][f"{part}.{way}"]["right"]) for way in ways} == {
            (w, True) for w in ways
        }
    assert found["train_1p5b_8k"]["times_unpadded_transformers"] > 0
    assert 0 < found["step"]["exact_pass_share"] < 1


@pytest.mark.slow
def test_the_learning_run_runs(tmp_path: Path) -> None:
    found = run("learning.py", tmp_path / "out.json", "--steps=2")
    for objective in ("disco", "grpo"):
        assert found[objective]["error"] is None
        assert len(found[objective]["curves"]["reward/mean"]) == 2
        assert found[objective]["evaluations"].keys() == {"0", "1", "2"}


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
    start = learning.new_model(AutoTokenizer.from_pretrained(tmp_path), tiny=True).state_dict()
    assert all(value.isfinite().all() for value in weights.values())
    assert any(not weights[name].equal(value) for name, value in start.items())
    assert json.loads((tmp_path / "tokenizer.json").read_text())["padding"] is None


def test_the_sections_fit_into_eight_minutes() -> None:
    assert run_all.BUDGET_S < 480
    for name in section.SECTIONS:
        assert callable(section.find(name)), name


def test_errors_and_hangs_are_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.CompletedProcess([], 1, stdout="", stderr="Traceback\nOutOfMemoryError: no")
    assert run_all.outcome(done) == {"error": "exit code 1\nTraceback\nOutOfMemoryError: no"}
    assert "error" in run_all.outcome(subprocess.CompletedProcess([], 0, stdout="", stderr=""))
    monkeypatch.setattr(run_all, "LEAST_S", 0)
    args = argparse.Namespace(output=tmp_path / "out.json", tiny=True)
    assert run_all.run("floors", {}, 0.05, args)["error"].startswith("not done after 0 s")
    monkeypatch.setattr(run_all, "LEAST_S", 15)
    assert run_all.run("floors", {}, 1.0, args)["error"] == "no time was left for it"


def test_what_a_section_started_ends_with_it(tmp_path: Path) -> None:
    """A process that it leaves holds its pipes: reading them to their end would never return."""
    started = tmp_path / "started"
    for last, late in (("sleep 600", True), ("echo {}", False)):
        command = ["sh", "-c", f"sleep 600 & echo $! > {started}; {last}"]
        began = time.monotonic()
        if late:
            with pytest.raises(subprocess.TimeoutExpired):
                run_all.run_within(command, 2.0, os.environ)
        else:
            assert run_all.outcome(run_all.run_within(command, 60.0, os.environ)) == {}
        assert time.monotonic() - began < 60
        assert gone(int(started.read_text()), within_s=30)
        started.unlink()


def test_the_table_says_what_held() -> None:
    results = {"train_1p5b_8k": {"mfu": 0.46, "tokens_per_second": 30.0}, "step": {"exact_pass_share": 0.3}}
    results["baseline_unpadded"] = {"tokens_per_second": 20.0}
    results["about"] = {"device": "cpu"}
    run_all.compare(results, tiny=False)
    lines = {line.split()[0]: line for line in run_all.table(results).splitlines()}
    assert lines["train_1p5b_8k.mfu"].endswith("yes")
    assert lines["train_1p5b_8k.times_unpadded_transformers"].endswith("yes")
    assert lines["step.exact_pass_share"].endswith("NO")
    assert lines["correctness.passed"].split()[1] == "-"
