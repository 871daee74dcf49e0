"""A response whose answer no machine can evaluate gets reward 0 after the grader's time limit, and the run goes on."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from commands import QUICKSTART, read_metrics, run_directory
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_disco.data.chat import encode_prompts
from nemo_disco.data.questions import load_questions

TOWER = "</think>\n\\boxed{9^{9^{9^{9}}}}"


@pytest.fixture
def tower_model(commands, tmp_path):
    """The quickstart's model after some steps on the response TOWER, with which it now answers most questions."""
    model = AutoModelForCausalLM.from_pretrained(QUICKSTART / "model")
    tokenizer = AutoTokenizer.from_pretrained(QUICKSTART / "model")
    prompts, _ = encode_prompts(
        tokenizer, load_questions([commands.directory / "train.jsonl"]).questions, "", 128, "error"
    )
    response = [*tokenizer.encode(TOWER), tokenizer.eos_token_id]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for i in range(60):
        prompt = prompts[i % len(prompts)].token_ids
        labels = torch.tensor([[-100] * len(prompt) + response])
        loss = model(input_ids=torch.tensor([prompt + response]), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    shutil.copytree(QUICKSTART / "model", tmp_path / "obsessed")
    model.save_pretrained(tmp_path / "obsessed")
    return tmp_path / "obsessed"


def test_a_power_tower_costs_its_time_limit(tower_model, commands, tmp_path):
    run = tmp_path / "run"
    overrides = ("reward.timeout=1", "reward.workers=2", "generation.temperature=0.1", "trainer.max_steps=2")
    commands("train", f"model.path={tower_model}", *overrides, run_directory(run)).ok()
    saved = [json.loads(line) for n in (1, 2) for line in (run / f"rollouts/step_{n}.jsonl").read_text().splitlines()]
    towers = [line for line in saved if line["response"] == TOWER]
    assert len(towers) > len(saved) / 2
    assert {line["reward"] for line in towers} == {0.0}
    # Four questions a step are four answers to compare with the tower, two at a time, with a limit of one second of
    # processor time each; a busy machine takes longer. Without that limit, a comparison would be ended after a minute.
    assert all(1 < line["time/grade"] < 50 for line in read_metrics(run))
