"""`nemo-disco evaluate` of runs, checkpoints and models; samples are saved and reused; a run keeps its best weights."""

from __future__ import annotations

import json
import signal
import time

import numpy as np
import torch
from commands import QUICKSTART, RESPONSE_LIMIT, WHOLE_RUN, read_metrics, run_directory
from fake_engine import ANY_MISMATCH, fake_python, response_tokens
from safetensors.torch import load_file

from nemo_disco.data.chat import encode_prompts
from nemo_disco.data.questions import load_questions
from nemo_disco.data.tokenizer import load_tokenizer
from nemo_disco.evaluation.result import read_evaluation
from nemo_disco.generation.worker.rollout_worker.tensors import checksum


def have_same_samples(one, other):
    """Whether two evaluation results have the same verdicts, lengths and votes for every sample."""
    return all((getattr(one, n) == getattr(other, n)).all() for n in ("correct", "lengths", "greedy_correct", "votes"))


def test_a_run_and_a_checkpoint_score_as_the_run_said(finished_run, commands, tmp_path):
    """The layout is the run's own, so that every sample of every problem is the same."""
    last = read_evaluation(finished_run.path / "evaluation/test.step_4.json")
    result = commands(
        "evaluate",
        *WHOLE_RUN,
        f"model.path={finished_run.path}",
        run_directory(tmp_path / "run"),
        ranks=finished_run.ranks,
    ).ok()
    assert have_same_samples(read_evaluation(tmp_path / "run/evaluation/test.step_4.json"), last)
    assert "maj@4" in result.out and "pass@2" in result.out
    step = finished_run.path / "checkpoints/step_2"
    commands(
        "evaluate", *WHOLE_RUN, f"model.path={step}", run_directory(tmp_path / "two"), ranks=finished_run.ranks
    ).ok()
    assert not have_same_samples(read_evaluation(tmp_path / "two/evaluation/test.step_2.json"), last)


def test_a_finished_evaluation_is_not_sampled_again(commands, tmp_path):
    """An evaluation with another seed is sampled anew."""
    small = ("evaluation.samples=2", run_directory(tmp_path))
    samples = tmp_path / "evaluation/test.step_0.samples.jsonl"
    commands("evaluate", *small).ok()
    first = samples.read_bytes()
    lines = first.splitlines(keepends=True)
    assert len(lines) == 1 + 8 * 3
    marked_lines = [line.replace(b'"sample": "greedy"', b'"sample":  "greedy"') for line in lines]
    samples.write_bytes(b"".join(marked_lines))
    commands("evaluate", *small).ok()
    assert samples.read_bytes() == b"".join(marked_lines)
    commands("evaluate", *small, "seed=9").ok()
    assert samples.read_bytes().splitlines()[1:] != first.splitlines()[1:]


def test_an_evaluation_killed_within_a_batch_goes_on_sample_by_sample(commands, tmp_path):
    many, rank_file = "evaluation.samples=64", tmp_path / "killed/evaluation/test.step_0.samples.rank_0.jsonl"
    commands("evaluate", many, run_directory(tmp_path / "whole")).ok()
    command = commands.start("evaluate", many, run_directory(tmp_path / "killed"))
    command.wait_for(rank_file)
    while not rank_file.stat().st_size:
        time.sleep(0.01)
    command.process.kill()
    assert command.wait().code == -signal.SIGKILL
    count = rank_file.read_bytes().count(b"\n")
    assert 0 < count < 8 * 65
    result = commands("evaluate", many, run_directory(tmp_path / "killed")).ok()
    assert f"with {count} samples of an unfinished batch" in result.err
    whole, resumed = (tmp_path / name / "evaluation/test.step_0.samples.jsonl" for name in ("whole", "killed"))
    assert resumed.read_bytes() == whole.read_bytes() and not rank_file.exists()


def test_an_evaluation_needs_no_training_files(commands, tmp_path):
    """It warns once if no response ends its thinking."""
    short = (
        "generation.max_response_length=2",
        "evaluation.samples=1",
        "reward.require_think=true",
        run_directory(tmp_path),
    )
    result = commands(
        "evaluate",
        "--config-name=config",
        f"model.path={QUICKSTART}/model",
        "data.train_files=[]",
        *short,
        "model.token_budget=2048",
    ).ok()
    assert read_evaluation(tmp_path / "evaluation/test.step_0.json").correct.shape == (8, 1)
    assert result.err.count("no response has </think>") == 1


def test_the_best_weights_of_a_run_are_kept(commands, tmp_path):
    run = tmp_path / "run"
    settings = ("trainer.max_steps=3", "evaluation.enabled=true", "evaluation.samples=2", "evaluation.every_n_steps=1")
    commands("train", *settings, "model.optim.lr=3e-3", run_directory(run)).ok()
    scores = [read_evaluation(run / f"evaluation/test.step_{n}.json").correct.mean() for n in range(4)]
    state = json.loads((run / "checkpoints/step_3/checkpoint.json").read_text())["loop_state"]
    assert state["best"]["score"] == max(scores[: state["best"]["step"] + 1])
    assert [line["eval/test/pass@1"] for line in read_metrics(run)] == scores[1:]
    best = scores.index(max(scores))
    assert (run / "best").exists() == (best > 0)
    if best:
        exported, last = (load_file(run / name / "model.safetensors") for name in ("best", "export"))
        assert all(torch.equal(exported[name], last[name]) for name in last) == (best == 3)


def test_an_engine_in_a_process_of_its_own_samples_with_these_weights_under_these_seeds(commands, tmp_path):
    """The samples are the same if the engine dies on the way."""
    own = ("generation=vllm", f"generation.python={fake_python(tmp_path)}", *ANY_MISMATCH)
    engine = (*own, "evaluation.samples=2", "seed=5")
    results = []
    for name, options in (("whole", "{}"), ("killed", f"{{fault: generate, at: 5, how: kill, once: {tmp_path}/once}}")):
        commands("evaluate", *engine, f"generation.options={options}", run_directory(tmp_path / name)).ok()
        results.append(read_evaluation(tmp_path / name / "evaluation/test.step_0.json"))
    assert (tmp_path / "once").exists() and have_same_samples(*results)
    weights = load_file(QUICKSTART / "model/model.safetensors")
    checksums = {name: checksum(tensor.float()) for name, tensor in weights.items() if name != "lm_head.weight"}
    questions = load_questions([commands.directory / "test.jsonl"]).questions
    prompts, _ = encode_prompts(load_tokenizer(QUICKSTART / "model"), questions, "", 96, "error")
    seeds = (np.random.SeedSequence((5, 2**32 - 1)).generate_state(16, np.uint64) >> 1).reshape(8, 2).tolist()
    expected = [
        [len(response_tokens(checksums, p.token_ids, s, RESPONSE_LIMIT)) for s in two]
        for p, two in zip(prompts, seeds, strict=True)
    ]
    assert results[0].lengths.tolist() == expected
