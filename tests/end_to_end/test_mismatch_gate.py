"""`nemo-disco verify` refuses an engine that disagrees with the trainer; every step of a run reports by how much."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from commands import at, metrics

from nemo_disco.data.rollouts import Rollouts


def test_an_engine_that_disagrees_is_refused_with_tokens_and_cause(commands, tmp_path):
    file = tmp_path / "rollouts"
    done = commands("verify", f"verify.rollouts={file}").ok()
    assert re.search(r"^noise floor\s+\d", done.out, re.MULTILINE) and "warning" not in done.out
    assert re.search(r"^mismatch worst\s+token \d+ \('.*'\), number \d+ of response \d+", done.out, re.MULTILINE)
    rollouts = Rollouts.load(file)
    noise = torch.randn(len(rollouts.generation_log_probs), generator=torch.Generator().manual_seed(0))
    replace(rollouts, generation_log_probs=rollouts.generation_log_probs + 0.08 * noise).save(file)
    done = commands("verify", f"verify.rollouts={file}")
    assert done.code == 2
    assert re.match(
        r"error: trainer and engine megatron disagree: mean e\^\|d\| 1\.0\d+ \(verify.max_mismatch=1.05\), "
        r"KL 0\.00\d+ \(verify.max_kl=0.001\); worst: token \d+ .*: trainer -\S+, engine -?\S+; .*; "
        r"likely cause: small and everywhere: precision",
        done.err,
    )
    commands("verify", f"verify.rollouts={file}", "verify.max_mismatch=1.2", "verify.max_kl=0.1").ok()


def test_every_step_reports_the_mismatch(commands, tmp_path):
    commands("train", at(tmp_path / "run")).ok()
    (step,) = metrics(tmp_path / "run")
    assert 0 <= step["mismatch/mean_abs"] <= step["mismatch/max_abs"] < 1e-4
    assert 1 <= step["mismatch/mean_exp_abs"] < 1.0001
    assert 0 <= step["mismatch/kl_k3"] < 1e-6
    worst = step["mismatch/worst_tokens"]
    apart = [abs(token["trainer"] - token["engine"]) for token in worst]
    assert len(worst) == 5 and apart == sorted(apart, reverse=True)
    assert apart[0] == pytest.approx(step["mismatch/max_abs"])
    assert all(token["token"] >= 0 and token["place"] >= 0 and token["response"] >= 0 for token in worst)
