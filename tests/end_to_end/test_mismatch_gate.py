"""`nemo-disco verify`, `train`, and `evaluate` with an engine in its own process refuse an engine that disagrees with
the trainer, before anything is trained or scored; every step reports the mismatch."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from commands import read_metrics, run_directory
from fake_engine import fake_python

from nemo_disco.data.rollouts import Rollouts


def test_an_engine_that_disagrees_is_refused_with_tokens_and_cause(commands, tmp_path):
    file = tmp_path / "rollouts"
    result = commands("verify", f"verify.rollouts={file}").ok()
    assert re.search(r"^noise floor\s+\d", result.out, re.MULTILINE) and "warning" not in result.out
    assert re.search(r"^mismatch worst\s+token \d+ \('.*'\), number \d+ of response \d+", result.out, re.MULTILINE)
    rollouts = Rollouts.load(file)
    noise = torch.randn(len(rollouts.generation_log_probs), generator=torch.Generator().manual_seed(0))
    replace(rollouts, generation_log_probs=rollouts.generation_log_probs + 0.08 * noise).save(file)
    result = commands("verify", f"verify.rollouts={file}")
    assert result.code == 2
    assert re.match(
        r"error: trainer and engine megatron disagree: mean e\^\|d\| 1\.0\d+ \(verify.max_mismatch=1.05\), "
        r"KL 0\.00\d+ \(verify.max_kl=null: 0.001 in float32\); worst: token \d+ .*: trainer -\S+, engine -?\S+; .*; "
        r"likely cause: small and everywhere: precision .*; to continue anyway, raise the limits$",
        result.err,
    )
    commands("verify", f"verify.rollouts={file}", "verify.max_mismatch=1.2", "verify.max_kl=0.1").ok()


def test_every_step_reports_the_mismatch(commands, tmp_path):
    commands("train", run_directory(tmp_path / "run")).ok()
    (step,) = read_metrics(tmp_path / "run")
    assert 0 <= step["mismatch/mean_abs"] <= step["mismatch/max_abs"] < 1e-4
    assert 1 <= step["mismatch/mean_exp_abs"] < 1.0001
    assert 0 <= step["mismatch/kl_k3"] < 1e-6
    worst = step["mismatch/worst_tokens"]
    differences = [abs(token["trainer"] - token["engine"]) for token in worst]
    assert len(worst) == 5 and differences == sorted(differences, reverse=True)
    assert differences[0] == pytest.approx(step["mismatch/max_abs"])
    assert all(token["token"] >= 0 and token["place"] >= 0 and token["response"] >= 0 for token in worst)


@pytest.mark.parametrize(
    "command", [("train",), ("train", "evaluation.enabled=true"), ("evaluate",)], ids=lambda command: " ".join(command)
)
def test_a_separate_engine_that_disagrees_is_refused_before_anything_is_trained_or_scored(command, commands, tmp_path):
    """The fake engine gives every token a log-prob of -0.5."""
    engine = ("generation=vllm", f"generation.python={fake_python(tmp_path)}")
    result = commands(*command, *engine, run_directory(tmp_path / "run"))
    assert result.code == 2
    (error,) = [line for line in result.err.splitlines() if "error" in line]
    assert re.match(r"error: trainer and engine vllm disagree: .*verify.max_mismatch=1.05.*likely cause: ", error)
    assert not list((tmp_path / "run").glob("checkpoints/step_*"))
    assert not list((tmp_path / "run").glob("evaluation/*"))
    if command == ("evaluate",):
        commands(
            *command, *engine, run_directory(tmp_path / "run"), "verify.max_mismatch=1e9", "verify.max_kl=1e9"
        ).ok()


FAULTY = """
from typing import ClassVar
from nemo_disco.algorithms.objectives.disco import DisCO
from nemo_disco.generation.megatron.cache import DecodingStep

class Faulty(DisCO):
    name: ClassVar[str] = "faulty"

attend = DecodingStep.attend
DecodingStep.attend = lambda *args, scale, **options: attend(*args, scale=2 * scale, **options)
"""


def test_a_fault_of_the_embedded_engine_stops_the_first_step_of_training(commands, tmp_path):
    """The module of the objective doubles the scale of attention over the cache."""
    (tmp_path / "faulty.py").write_text(FAULTY)
    environment = {"PYTHONPATH": str(tmp_path)}
    settings = ("algorithm.name=faulty:Faulty", run_directory(tmp_path / "run"))
    result = commands("train", *settings, **environment)
    assert result.code == 2 and "error: trainer and engine megatron disagree" in result.err
    assert not read_metrics(tmp_path / "run")
    assert commands("train", *settings, "verify.max_mismatch=1e9", "verify.max_kl=1e9", **environment).ok()
