"""A whole run through the command line, on one rank and on two: its files, its output and its export."""

from __future__ import annotations

import json
import math
import os
import shutil
import stat

import numpy as np
import pytest
import torch
from commands import QUICKSTART, RESPONSE_LIMIT, WHOLE_RUN, read_metrics, run_directory
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_disco.config.compose import load_run_config
from nemo_disco.data.chat import decode, encode_prompts
from nemo_disco.data.questions import load_questions
from nemo_disco.data.rollouts import Rollouts
from nemo_disco.evaluation.result import read_evaluation
from nemo_disco.evaluation.saved_tokens import unpack_values, unpack_widths
from nemo_disco.rewards import MathGrader

CONTRACT = {
    *("step", "reward/mean", "objective/value", "policy/kl", "policy/kl_k3", "policy/kl_stderr", "policy/entropy"),
    *("constraint/active", "response/length_mean", "groups/mixed", "grad_norm", "tokens", "mini_batches/skipped"),
    *(f"time/{part}" for part in ("generate", "grade", "log_probs", "train", "refit", "step")),
}


def test_the_directory_holds_what_the_contract_names(finished_run):
    names = {path.name for path in finished_run.path.iterdir() if not path.name.startswith(".")}
    assert names == {
        *("config.yaml", "metrics.jsonl", "tensorboard", "checkpoints", "rollouts", "evaluation", "export"),
        "report.html",
    }
    assert sorted(path.name for path in (finished_run.path / "checkpoints").iterdir()) == ["step_2", "step_4"]
    assert [path.name for path in sorted((finished_run.path / "rollouts").iterdir())] == [
        f"step_{n}.jsonl" for n in (1, 2, 3, 4)
    ]
    config = load_run_config(finished_run.path / "config.yaml")
    assert (config.trainer.max_steps, config.trainer.devices) == (4, finished_run.ranks)
    assert "</html>" in (finished_run.path / "report.html").read_text()


def test_files_are_readable_as_the_umask_says(finished_run):
    umask = os.umask(0)
    os.umask(umask)
    for path in (finished_run.path, *finished_run.path.rglob("*")):
        assert oct(stat.S_IMODE(path.stat().st_mode)) == oct((0o777 if path.is_dir() else 0o666) & ~umask), path


def test_every_step_has_every_metric_of_the_contract(finished_run):
    lines = read_metrics(finished_run.path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert set(line) >= CONTRACT
        assert all(math.isfinite(line[name]) for name in CONTRACT)
        assert line["time/step"] > line["time/train"] > 0
        assert line["grad_norm"] > 0 or not line["groups/mixed"]
    assert any(line["groups/mixed"] and line["policy/kl_stderr"] and line["reward/mean"] for line in lines)
    assert "eval/test/pass@1" in lines[-1] and not any("eval/test/pass@1" in line for line in lines[:-1])
    events = EventAccumulator(str(finished_run.path / "tensorboard"))
    events.Reload()
    assert [(e.step, pytest.approx(e.value)) for e in events.Scalars("policy/kl")] == [
        (line["step"], line["policy/kl"]) for line in lines
    ]


def test_some_rollouts_of_a_step_are_there_to_read(finished_run):
    lines = [json.loads(line) for line in (finished_run.path / "rollouts/step_3.jsonl").read_text().splitlines()]
    assert len(lines) == 8  # exp_manager.saved_rollouts
    for line in lines:
        assert line["question"] in line["prompt"] and line["prompt"].endswith("<think>\n")
        assert line["reward"] == float(line["correct"]) and 0 < line["length"] <= RESPONSE_LIMIT
        widths = unpack_widths(line["token_widths"])
        assert widths is not None and len(widths) == line["length"] and sum(widths) == len(line["response"])
        for name in ("weight", "log_ratio"):
            assert unpack_values(line[name], line["length"]) is not None
    # The last of these responses are of the step's second mini-batch, for which the policy had already moved.
    assert any(np.abs(unpack_values(line["log_ratio"], line["length"])).max() > 0 for line in lines)
    assert {np.sign(unpack_values(line["weight"], 1)[0]) for line in lines if line["correct"]} <= {0.0, 1.0}


def test_the_output_ends_with_a_table_and_the_path_of_the_model(finished_run):
    assert "test: 8 questions, before and after 4 steps" in finished_run.result.out
    for words in ("Pass@1 (avg@4)", "greedy accuracy", "pass@4", "95% CI", f"{finished_run.path}/export"):
        assert words in finished_run.result.out
    assert finished_run.result.err == ""


def test_the_export_scores_the_same(finished_run, commands, tmp_path):
    """Each sample of each problem has the same verdict and length; equal means would not be enough."""
    overrides = (*WHOLE_RUN, f"model.path={finished_run.path}/export", run_directory(tmp_path / "run"))
    result = commands("evaluate", *overrides, ranks=finished_run.ranks).ok()
    again = read_evaluation(tmp_path / "run/evaluation/test.step_0.json")
    last = read_evaluation(finished_run.path / "evaluation/test.step_4.json")
    first = read_evaluation(finished_run.path / "evaluation/test.step_0.json")
    for name in ("correct", "lengths", "truncated", "greedy_correct"):
        assert (getattr(again, name) == getattr(last, name)).all(), name
    assert (last.lengths != first.lengths).any()  # the trained policy, not the one it came from
    assert f"pass@1     {read_metrics(finished_run.path)[-1]['eval/test/pass@1']:.4f}" in result.out


def test_evaluating_in_a_runs_own_directory_leaves_its_results(finished_run, commands, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished_run.path, run)
    result = commands("evaluate", f"model.path={run}/export", run_directory(run)).ok()
    assert f"written to {run}/evaluate/test.step_0.json" in result.out
    for file in finished_run.path.glob("evaluation/*.json"):
        assert (run / "evaluation" / file.name).read_bytes() == file.read_bytes()


def test_transformers_computes_the_export_as_the_engine_does(finished_run, commands, tmp_path):
    export, file = finished_run.path / "export", tmp_path / "rollouts.safetensors"
    commands("verify", f"model.path={export}", f"verify.rollouts={file}", ranks=finished_run.ranks).ok()
    model = AutoModelForCausalLM.from_pretrained(export).eval()
    rollouts = Rollouts.load(file)
    with torch.no_grad():
        for i in range(len(rollouts)):
            response, tokens = rollouts.response(i), torch.cat([rollouts.prompt(i), rollouts.response(i)])
            logits = model(tokens[None]).logits[0, -len(response) - 1 : -1].double()
            expected = logits.log_softmax(-1).gather(1, response[:, None])[:, 0]
            engine_log_probs = rollouts.generation_log_probs[rollouts.token_index([i])].double()
            assert (expected - engine_log_probs).abs().max() < 1e-4


def test_transformers_answers_greedily_as_the_final_evaluation_says(finished_run, commands):
    model = AutoModelForCausalLM.from_pretrained(finished_run.path / "export").eval()
    tokenizer = AutoTokenizer.from_pretrained(finished_run.path / "export")
    questions = load_questions([commands.directory / "test.jsonl"]).questions
    prompts, _ = encode_prompts(tokenizer, questions, "", 128, "error")
    texts = []
    for prompt in prompts:
        ids = torch.tensor([prompt.token_ids])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=RESPONSE_LIMIT)
        texts.append(decode(tokenizer, out[0, ids.shape[1] :]).removesuffix(tokenizer.eos_token))
    with MathGrader(require_think=True) as grader:
        rewards = grader.grade(texts, [q.answers for q in questions])
    last = read_evaluation(finished_run.path / "evaluation/test.step_4.json")
    assert [r == 1 for r in rewards] == last.greedy_correct.tolist()


def test_training_moved_the_weights(finished_run):
    before = load_file(QUICKSTART / "model/model.safetensors")
    after = load_file(finished_run.path / "export/model.safetensors")
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before if "bias" not in name)
