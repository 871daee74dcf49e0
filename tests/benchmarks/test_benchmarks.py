"""Each benchmark runs to its end at a tiny size, gives its sides equal work, and has the lengths that it promises.

Speed itself is not tested.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import common  # noqa: E402 - in the directory added above, not in a package
import train_step  # noqa: E402


def run(script: str, tmp_path: Path, *options: str) -> dict[str, Any]:
    """Run a benchmark once on a tiny model, and return the record that it writes."""
    output = tmp_path / "record.json"
    subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *options, "--hidden=64", "--repeats=1", f"--output={output}"],
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    record: dict[str, Any] = json.loads(output.read_text())
    return record


@pytest.mark.parametrize("ends", [True, False])
def test_the_model_ends_by_chance_alone(tmp_path: Path, ends: bool) -> None:
    limit = 40
    common.make_model(tmp_path, limit, ends=ends, hidden=64)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = torch.randint(2, common.VOCABULARY, (4, 60), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        chances = model(tokens).logits.softmax(-1)
    expected = torch.full((4, 60), 2.82 / limit if ends else 0.0)
    torch.testing.assert_close(chances[..., common.EOS], expected, rtol=0.25, atol=1e-6)
    assert chances[..., common.PAD].max() < 1e-9


def test_both_sides_read_the_same_prompts(tmp_path: Path) -> None:
    common.make_model(tmp_path, 40, ends=True, hidden=64)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    prompts = common.make_prompts(5)
    assert sorted(map(len, prompts)) == [16, 28, 40, 52, 64]
    assert tokenizer([common.as_text(prompt) for prompt in prompts])["input_ids"] == prompts


def test_lengths_are_a_third_of_the_limit_and_half_of_the_responses_right() -> None:
    rollouts = train_step.make_random_rollouts(questions=200, limit=300)
    assert 0.31 < rollouts.response_lengths.double().mean() / 300 < 0.36
    assert rollouts.response_lengths.max() <= 300
    assert 0.45 < rollouts.rewards.mean() < 0.55


@pytest.mark.slow
def test_a_checkpoint_in_the_background_blocks_less(tmp_path: Path) -> None:
    record = run("checkpoint.py", tmp_path, "--questions=1")
    for result in record["result"].values():
        assert 0 < result["blocked"] < result["synchronous"]
        assert result["steps_beside"] > 0 and sum(result["megabytes"]) > 1


@pytest.mark.slow
def test_train_step(tmp_path: Path) -> None:
    record = run("train_step.py", tmp_path, "--questions=4", "--limit=24", "--mini-batches=2", "--micro-batch=4")
    packed, padded = record["runs"]["ours"][0], record["runs"]["padded"][0]
    assert packed["grad_norm"] == pytest.approx(padded["grad_norm"], rel=1e-3)
    assert 0 < packed["pass1_share"] < 1 and record["result"]["speedup"] > 0
    assert 0 < packed["added_mb"] < packed["peak_mb"]


@pytest.mark.slow
def test_scaling(tmp_path: Path) -> None:
    """Equal gradients are not checked here, since the script itself stops if the layouts' gradients differ."""
    sizes = ["--questions=4", "--limit=24", "--mini-batches=2"]
    record = run("scaling.py", tmp_path, *sizes, "--layouts", "DP 1", "TP 2")
    one, two = (record["result"][layout] for layout in ("DP 1", "TP 2"))
    assert one["speedup"] == one["work_of_one_process"] == 1.0 and two["speedup"] > 0
    assert 0 <= one["communication_share"] < two["communication_share"] < 1
    assert one["two_passes_of_one"] > 1 and 0 < one["fill"] <= one["fill_of_possible"] <= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "options"),
    [("generation.py", ["--group=16"]), ("whole_step.py", ["--group=16", "--mini-batches=2", "--without-trl"])],
)
def test_lengths_spread_or_reach_the_limit(tmp_path: Path, script: str, options: list[str]) -> None:
    spread, full = run(script, tmp_path, "--questions=8", "--limit=24", *options)["results"].values()
    assert all(0.2 < length < 0.5 for length in spread["mean_length_of_limit"].values())
    assert all(length == 1.0 for length in full["mean_length_of_limit"].values())
