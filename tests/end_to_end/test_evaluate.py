"""`nemo-disco evaluate` of whatever holds weights; what was sampled is kept; so are the best weights of a run."""

from __future__ import annotations

import json
import signal
import time

import numpy as np
import torch
from commands import LIMIT, QUICKSTART, WHOLE, at, metrics
from fake_engine import ANY_MISMATCH, answer, fake_python
from safetensors.torch import load_file

from nemo_disco.data.chat import encode_prompts
from nemo_disco.data.questions import load_questions
from nemo_disco.data.tokenizer import load_tokenizer
from nemo_disco.evaluation.result import read_evaluation
from nemo_disco.generation.worker.rollout_worker.tensors import checksum


def same(one, other):
    return all((getattr(one, n) == getattr(other, n)).all() for n in ("correct", "lengths", "greedy_correct", "votes"))


def test_a_run_and_a_checkpoint_score_as_the_run_said(finished, commands, tmp_path):
    """At the run's own layout, so that every sample of every problem is the same."""
    last = read_evaluation(finished.path / "evaluation/test.step_4.json")
    done = commands("evaluate", *WHOLE, f"model.path={finished.path}", at(tmp_path / "run"), ranks=finished.ranks).ok()
    assert same(read_evaluation(tmp_path / "run/evaluation/test.step_4.json"), last)
    assert "maj@4" in done.out and "pass@2" in done.out
    step = finished.path / "checkpoints/step_2"
    commands("evaluate", *WHOLE, f"model.path={step}", at(tmp_path / "two"), ranks=finished.ranks).ok()
    assert not same(read_evaluation(tmp_path / "two/evaluation/test.step_2.json"), last)


def test_an_evaluation_that_was_done_is_not_sampled_again(commands, tmp_path):
    """... but one with another seed is."""
    small, samples = ("evaluation.samples=2", at(tmp_path)), tmp_path / "evaluation/test.step_0.samples.jsonl"
    commands("evaluate", *small).ok()
    first = samples.read_bytes()
    lines = first.splitlines(keepends=True)
    assert len(lines) == 1 + 8 * 3
    marked = [line.replace(b'"sample": "greedy"', b'"sample":  "greedy"') for line in lines]
    samples.write_bytes(b"".join(marked))
    commands("evaluate", *small).ok()
    assert samples.read_bytes() == b"".join(marked)
    commands("evaluate", *small, "seed=9").ok()
    assert samples.read_bytes().splitlines()[1:] != first.splitlines()[1:]


def test_killed_within_a_batch_it_goes_on_sample_by_sample(commands, tmp_path):
    many, part = "evaluation.samples=64", tmp_path / "killed/evaluation/test.step_0.samples.rank_0.jsonl"
    commands("evaluate", many, at(tmp_path / "whole")).ok()
    killed = commands.start("evaluate", many, at(tmp_path / "killed"))
    killed.wait_for(part)
    while not part.stat().st_size:
        time.sleep(0.01)
    killed.process.kill()
    assert killed.wait().code == -signal.SIGKILL
    kept = part.read_bytes().count(b"\n")
    assert 0 < kept < 8 * 65
    done = commands("evaluate", many, at(tmp_path / "killed")).ok()
    assert f"with {kept} samples of an unfinished batch" in done.err
    whole, resumed = (tmp_path / name / "evaluation/test.step_0.samples.jsonl" for name in ("whole", "killed"))
    assert resumed.read_bytes() == whole.read_bytes() and not part.exists()


def test_it_needs_no_training_files(commands, tmp_path):
    """... and warns of responses that never end their thinking."""
    short = ("generation.max_response_length=2", "evaluation.samples=1", "reward.require_think=true", at(tmp_path))
    done = commands(
        "evaluate",
        "--config-name=config",
        f"model.path={QUICKSTART}/model",
        "data.train_files=[]",
        *short,
        "model.token_budget=2048",
    ).ok()
    assert read_evaluation(tmp_path / "evaluation/test.step_0.json").correct.shape == (8, 1)
    assert done.err.count("no response has </think>") == 1


def test_the_best_weights_of_a_run_are_kept(commands, tmp_path):
    run = tmp_path / "run"
    settings = ("trainer.max_steps=3", "evaluation.enabled=true", "evaluation.samples=2", "evaluation.every_n_steps=1")
    commands("train", *settings, "model.optim.lr=3e-3", at(run)).ok()
    scores = [read_evaluation(run / f"evaluation/test.step_{n}.json").correct.mean() for n in range(4)]
    state = json.loads((run / "checkpoints/step_3/checkpoint.json").read_text())["loop_state"]
    assert state["best"]["score"] == max(scores[: state["best"]["step"] + 1])
    assert [line["eval/test/pass@1"] for line in metrics(run)] == scores[1:]
    best = scores.index(max(scores))
    assert (run / "best").exists() == (best > 0)
    if best:
        exported, last = (load_file(run / name / "model.safetensors") for name in ("best", "export"))
        assert all(torch.equal(exported[name], last[name]) for name in last) == (best == 3)


def test_an_engine_in_a_process_of_its_own_samples_with_these_weights_under_these_seeds(commands, tmp_path):
    """... also when it dies on the way."""
    own = ("generation=vllm", f"generation.python={fake_python(tmp_path)}", *ANY_MISMATCH)
    engine = (*own, "evaluation.samples=2", "seed=5")
    found = []
    for name, options in (("whole", "{}"), ("killed", f"{{fault: generate, at: 5, how: kill, once: {tmp_path}/once}}")):
        commands("evaluate", *engine, f"generation.options={options}", at(tmp_path / name)).ok()
        found.append(read_evaluation(tmp_path / name / "evaluation/test.step_0.json"))
    assert (tmp_path / "once").exists() and same(*found)
    weights = load_file(QUICKSTART / "model/model.safetensors")
    sums = {name: checksum(tensor.float()) for name, tensor in weights.items() if name != "lm_head.weight"}
    questions = load_questions([commands.directory / "test.jsonl"]).questions
    prompts, _ = encode_prompts(load_tokenizer(QUICKSTART / "model"), questions, "", 96, "error")
    seeds = (np.random.SeedSequence((5, 2**32 - 1)).generate_state(16, np.uint64) >> 1).reshape(8, 2).tolist()
    expected = [[len(answer(sums, p.token_ids, s, LIMIT)) for s in two] for p, two in zip(prompts, seeds, strict=True)]
    assert found[0].lengths.tolist() == expected
