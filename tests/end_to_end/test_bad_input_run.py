"""A user's mistake ends in one line that names the fault, its place and the remedy, before time is spent."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from commands import QUICKSTART, WHOLE, at

MODEL = QUICKSTART / "model"
ALONE = pytest.mark.parametrize("finished", [1], indirect=True, ids=["DP1"])


@pytest.fixture
def model(tmp_path):
    """A copy of the quickstart's model, to damage."""
    shutil.copytree(MODEL, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def refused(commands, tmp_path):
    """The one line with which a command is refused."""

    def line(*overrides, command="train", run=None):
        done = commands(command, at(run or tmp_path / "run"), *overrides)
        assert done.code == 2, done.out + done.err
        assert re.fullmatch(r"error: .*\n", done.err), done.err
        assert done.out == ""
        assert not (tmp_path / "run/metrics.jsonl").exists()
        return done.err

    return line


def questions(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return f"data.train_files=[{path}]"


GOOD = {"problem": "What is 1 + 1?", "answer": "2"}


def test_no_model(refused, tmp_path):
    assert f"{tmp_path}/nowhere: no Hugging Face model there" in refused(f"model.path={tmp_path}/nowhere")


def test_a_truncated_model(refused, model):
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert f"{weights}: damaged safetensors file" in refused(f"model.path={model}")


def test_a_model_with_other_weights_than_its_config_says(refused, model):
    config = json.loads((model / "config.json").read_text()) | {"num_hidden_layers": 5, "layer_types": None}
    (model / "config.json").write_text(json.dumps(config))
    line = refused(f"model.path={model}")
    assert "the weights do not fit config.json: missing model.layers.4." in line


def test_pickled_weights_are_not_opened(refused, model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    line = refused(f"model.path={model}")
    assert "pytorch_model.bin is pickled and is not opened" in line


@pytest.mark.parametrize(
    ("absent", "words"), [("eos_token", "has no EOS token"), ("chat_template", "no chat template")]
)
def test_a_tokenizer_that_lacks_what_is_needed(absent, words, refused, model):
    file = model / "tokenizer_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {absent: None}))
    if absent == "chat_template":
        (model / "chat_template.jinja").unlink()
    assert words in refused(f"model.path={model}")


def test_no_question_file(refused, tmp_path):
    line = refused(f"data.train_files=[{tmp_path}/nowhere.jsonl]")
    assert f"data.train_files: there is no {tmp_path}/nowhere.jsonl" in line


def test_an_empty_question_file(refused, tmp_path):
    assert f"{tmp_path}/q.jsonl: the file holds no records; give one that does" in refused(
        questions(tmp_path / "q.jsonl")
    )


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"problem": "What is', "line 3, column 21: not valid JSON"),
        ({"problem": 7, "answer": "2"}, "line 3: `problem` is of type int, not text"),
        ({"answer": "2"}, "line 3: no question; expected one of the fields problem"),
        ({"problem": "What?", "answer": {"a": 1}}, "line 3: `answer` is {'a': 1}"),
    ],
)
def test_a_malformed_question_names_its_line_and_field(line, words, refused, tmp_path):
    assert f"{tmp_path}/q.jsonl, {words}" in refused(questions(tmp_path / "q.jsonl", GOOD, GOOD, line))


def test_fewer_questions_than_a_step_asks(refused, tmp_path):
    assert "data.questions_per_step is 4, but there are 2" in refused(questions(tmp_path / "q.jsonl", GOOD, GOOD))


def test_a_question_over_the_limit(refused, tmp_path):
    long = {"problem": "What is 1 + 1? " * 100, "answer": "2"}
    line = refused(questions(tmp_path / "q.jsonl", GOOD, GOOD, long, GOOD, GOOD))
    assert re.search(rf"{tmp_path}/q.jsonl, line 3: the prompt has \d+ tokens, data.max_prompt_length is \d+", line)
    assert "data.too_long=drop" in line


def test_evaluation_questions_are_read_before_training_too(refused, tmp_path):
    (tmp_path / "e.jsonl").write_text("[]\n")
    line = refused("evaluation.enabled=true", f"evaluation.files=[{tmp_path}/e.jsonl]")
    assert f"{tmp_path}/e.jsonl, line 1: a list, not an object with fields" in line


def test_evaluation_files_whose_results_would_have_one_name(refused, tmp_path):
    """File names of results have no spaces."""
    for name in ("a/my set.jsonl", "b/my_set.jsonl"):
        (tmp_path / name).parent.mkdir()
        questions(tmp_path / name, GOOD)
    line = refused(f"evaluation.files=['{tmp_path}/a/my set.jsonl',{tmp_path}/b/my_set.jsonl]", command="evaluate")
    assert "evaluation.files: two files are named my_set" in line


def test_a_run_directory_that_cannot_be_made(refused, tmp_path):
    (tmp_path / "file").touch()
    line = refused(run=tmp_path / "file/run")
    assert f"run directory {tmp_path}/file/run cannot be written" in line


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trainer.max_steps=many", "trainer.max_steps: expected an integer of at least 1, got \"many\""),
        ("generation.temperature=0", "generation.temperature: expected a number above 0"),
        ("trainer.max_stepz=1", "unknown key trainer.max_stepz; did you mean trainer.max_steps?"),
        ("algorithm=discoo", "algorithm has no choice discoo; did you mean disco?"),
        ("algorithm.tau=0", "objective disco: tau must be above 0; it is 0"),
        ("algorithm.score=likelihood", "objective disco: score must be one of: l"),
        ("algorithm.preference=length", "objective disco does not take 'preference'"),
        ("reward.function=nowhere:f", "reward.function=nowhere:f: importing nowhere raised ModuleNotFoundError"),
        ("algorithm.reference_reset_steps=3", "objective disco has no reference as it is set"),
        ("algorithm.name=discoo", "there is no objective 'discoo'; known: disco, "),
        ("algorithm.name=nowhere:Mine", "algorithm.name=nowhere:Mine: importing nowhere raised ModuleNotFoundError"),
        ("algorithm.clip_low=0.2", "objective disco does not take 'clip_low'"),
        ("algorithm.kl_coefficient=0.1", "objective disco does not take 'kl_coefficient'"),
        ("model.token_budget=100", "model.token_budget=100 is smaller than one response with its prompt"),
        ("model.tensor_model_parallel_size=3", "needs a multiple of 3 processes, but there are 1"),
        ("algorithm.mini_batch_questions=3", "mini_batch_questions=3 does not divide data.questions_per_step=4"),
        ("generation.max_response_length=9999", "tokens, but the model has 4096 positions"),
    ],
)  # fmt: skip
def test_settings(override, words, refused):
    assert words in refused("model.token_budget=20000", override)


def test_an_engine_whose_interpreter_is_not_there(refused):
    line = refused("generation=vllm", "generation.python=nowhere/python")
    assert "generation.python=nowhere/python is not there; make it with `make vllm`" in line


@ALONE
def test_a_used_directory_that_is_not_to_be_resumed(refused, finished, tmp_path):
    used = tmp_path / "used"
    shutil.copytree(finished.path, used)
    line = refused("exp_manager.resume_if_exists=false", run=used)
    assert f"{used} holds checkpoints of an earlier run and exp_manager.resume_if_exists is false" in line


@ALONE
def test_the_checkpoint_of_another_model(commands, finished, model, tmp_path):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config.from_pretrained(model)
    config.intermediate_size //= 2
    Qwen2ForCausalLM(config).save_pretrained(model)
    shutil.copytree(finished.path, tmp_path / "run")
    done = commands("train", *WHOLE, "trainer.max_steps=5", f"model.path={model}", at(tmp_path / "run"))
    assert done.code == 2
    line = done.err.splitlines()[-1]
    assert f"error: checkpoint {tmp_path}/run/checkpoints/step_4 is of another model than {model}: " in line
    assert "ffn_hidden_size is 384 there and 192 here" in line


@ALONE
@pytest.mark.parametrize("change", ["seed=7", "data.questions_per_step=8"])
def test_a_checkpoint_of_another_data_order(change, commands, finished, tmp_path):
    shutil.copytree(finished.path, tmp_path / "run")
    done = commands("train", *WHOLE, "trainer.max_steps=5", change, at(tmp_path / "run"))
    assert done.code == 2
    key, _, value = change.rpartition("=")
    assert f"the checkpoint's data order was made with {key.rpartition('.')[2]}=" in done.err
    assert f"this run has {value}" in done.err


def test_every_command_refuses(refused, tmp_path):
    for command in ("evaluate", "verify"):
        assert "no Hugging Face model there" in refused(f"model.path={tmp_path}/nowhere", command=command)
    assert "evaluation.files is empty" in refused("evaluation.files=[]", command="evaluate")


def test_the_command_line_says_it_in_seconds_and_once_for_all_ranks(commands, tmp_path):
    """A mistake that needs no model is found before the ranks start; one that a rank finds is one line too."""
    early = commands.start("train", "algorithm.mini_batch_questions=3", at(tmp_path / "run"), devices=2).wait()
    late = commands.start("train", questions(tmp_path / "q.jsonl", GOOD, "{"), at(tmp_path / "run"), devices=2).wait()
    for done in (early, late):
        assert done.code == 2
        assert re.fullmatch(r"error: .*\n", done.err), done.err
    assert early.seconds < late.seconds
