"""A user's mistake ends the command at once with one line, which names the fault, its place and the remedy.

Most tests are named after the mistake.
"""

from __future__ import annotations

import json
import re
import shutil

import pytest
from commands import QUICKSTART, WHOLE_RUN, run_directory

MODEL = QUICKSTART / "model"
ONE_RANK = pytest.mark.parametrize("finished_run", [1], indirect=True, ids=["DP1"])


@pytest.fixture
def model(tmp_path):
    """A copy of the quickstart's model, to damage."""
    shutil.copytree(MODEL, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def get_refusal(commands, tmp_path):
    """A function that runs a command, checks that it is refused in one line, and returns this line."""

    def run_command(*overrides, command="train", run=None):
        result = commands(command, run_directory(run or tmp_path / "run"), *overrides)
        assert result.code == 2, result.out + result.err
        assert re.fullmatch(r"error: .*\n", result.err), result.err
        assert result.out == ""
        assert not (tmp_path / "run/metrics.jsonl").exists()
        return result.err

    return run_command


def write_questions(path, *lines):
    """Write a file of training questions. Returns the override that names it."""
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return f"data.train_files=[{path}]"


GOOD_QUESTION = {"problem": "What is 1 + 1?", "answer": "2"}


def test_no_model(get_refusal, tmp_path):
    assert f"{tmp_path}/nowhere: no Hugging Face model there" in get_refusal(f"model.path={tmp_path}/nowhere")


def test_a_truncated_model(get_refusal, model):
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert f"{weights}: damaged safetensors file" in get_refusal(f"model.path={model}")


def test_a_model_with_other_weights_than_its_config_says(get_refusal, model):
    config = json.loads((model / "config.json").read_text()) | {"num_hidden_layers": 5, "layer_types": None}
    (model / "config.json").write_text(json.dumps(config))
    line = get_refusal(f"model.path={model}")
    assert "the weights do not fit config.json: missing model.layers.4." in line


def test_pickled_weights_are_not_opened(get_refusal, model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    line = get_refusal(f"model.path={model}")
    assert "pytorch_model.bin is pickled and is not opened" in line


@pytest.mark.parametrize(
    ("absent", "words"), [("eos_token", "has no EOS token"), ("chat_template", "no chat template")]
)
def test_a_tokenizer_that_lacks_what_is_needed(absent, words, get_refusal, model):
    file = model / "tokenizer_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {absent: None}))
    if absent == "chat_template":
        (model / "chat_template.jinja").unlink()
    assert words in get_refusal(f"model.path={model}")


def test_no_question_file(get_refusal, tmp_path):
    line = get_refusal(f"data.train_files=[{tmp_path}/nowhere.jsonl]")
    assert f"data.train_files: there is no {tmp_path}/nowhere.jsonl" in line


def test_an_empty_question_file(get_refusal, tmp_path):
    assert f"{tmp_path}/q.jsonl: the file holds no records; give one that does" in get_refusal(
        write_questions(tmp_path / "q.jsonl")
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
def test_a_malformed_question_names_its_line_and_field(line, words, get_refusal, tmp_path):
    assert f"{tmp_path}/q.jsonl, {words}" in get_refusal(
        write_questions(tmp_path / "q.jsonl", GOOD_QUESTION, GOOD_QUESTION, line)
    )


def test_fewer_questions_than_a_step_asks(get_refusal, tmp_path):
    assert "data.questions_per_step is 4, but there are 2" in get_refusal(
        write_questions(tmp_path / "q.jsonl", GOOD_QUESTION, GOOD_QUESTION)
    )


def test_a_question_over_the_limit(get_refusal, tmp_path):
    long = {"problem": "What is 1 + 1? " * 100, "answer": "2"}
    line = get_refusal(
        write_questions(tmp_path / "q.jsonl", GOOD_QUESTION, GOOD_QUESTION, long, GOOD_QUESTION, GOOD_QUESTION)
    )
    assert re.search(rf"{tmp_path}/q.jsonl, line 3: the prompt has \d+ tokens, data.max_prompt_length is \d+", line)
    assert "data.too_long=drop" in line


def test_evaluation_questions_are_read_before_training_too(get_refusal, tmp_path):
    (tmp_path / "e.jsonl").write_text("[]\n")
    line = get_refusal("evaluation.enabled=true", f"evaluation.files=[{tmp_path}/e.jsonl]")
    assert f"{tmp_path}/e.jsonl, line 1: a list, not an object with fields" in line


def test_evaluation_files_whose_results_would_have_one_name(get_refusal, tmp_path):
    """File names of results have no spaces."""
    for name in ("a/my set.jsonl", "b/my_set.jsonl"):
        (tmp_path / name).parent.mkdir()
        write_questions(tmp_path / name, GOOD_QUESTION)
    line = get_refusal(f"evaluation.files=['{tmp_path}/a/my set.jsonl',{tmp_path}/b/my_set.jsonl]", command="evaluate")
    assert "evaluation.files: two files are named my_set" in line


def test_a_run_directory_that_cannot_be_made(get_refusal, tmp_path):
    (tmp_path / "file").touch()
    line = get_refusal(run=tmp_path / "file/run")
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
def test_settings(override, words, get_refusal):
    assert words in get_refusal("model.token_budget=20000", override)


def test_an_engine_whose_interpreter_is_not_there(get_refusal):
    line = get_refusal("generation=vllm", "generation.python=nowhere/python")
    assert "generation.python=nowhere/python is not there; make it with `make vllm`" in line


@ONE_RANK
def test_a_used_directory_that_is_not_to_be_resumed(get_refusal, finished_run, tmp_path):
    used = tmp_path / "used"
    shutil.copytree(finished_run.path, used)
    line = get_refusal("exp_manager.resume_if_exists=false", run=used)
    assert f"{used} holds checkpoints of an earlier run and exp_manager.resume_if_exists is false" in line


@ONE_RANK
def test_the_checkpoint_of_another_model(commands, finished_run, model, tmp_path):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config.from_pretrained(model)
    config.intermediate_size //= 2
    Qwen2ForCausalLM(config).save_pretrained(model)
    shutil.copytree(finished_run.path, tmp_path / "run")
    result = commands(
        "train", *WHOLE_RUN, "trainer.max_steps=5", f"model.path={model}", run_directory(tmp_path / "run")
    )
    assert result.code == 2
    line = result.err.splitlines()[-1]
    assert f"error: checkpoint {tmp_path}/run/checkpoints/step_4 is of another model than {model}: " in line
    assert "ffn_hidden_size is 384 there and 192 here" in line


@ONE_RANK
@pytest.mark.parametrize("change", ["seed=7", "data.questions_per_step=8"])
def test_a_checkpoint_of_another_data_order(change, commands, finished_run, tmp_path):
    shutil.copytree(finished_run.path, tmp_path / "run")
    result = commands("train", *WHOLE_RUN, "trainer.max_steps=5", change, run_directory(tmp_path / "run"))
    assert result.code == 2
    key, _, value = change.rpartition("=")
    assert f"the checkpoint's data order was made with {key.rpartition('.')[2]}=" in result.err
    assert f"this run has {value}" in result.err


def test_every_command_refuses_missing_models_and_files(get_refusal, tmp_path):
    for command in ("evaluate", "verify"):
        assert "no Hugging Face model there" in get_refusal(f"model.path={tmp_path}/nowhere", command=command)
    assert "evaluation.files is empty" in get_refusal("evaluation.files=[]", command="evaluate")


def test_the_command_line_reports_a_mistake_once_for_all_ranks_and_early_if_it_needs_no_model(commands, tmp_path):
    """Such a mistake is found before the ranks start; a mistake that the ranks find is reported in one line too."""
    early = commands.start(
        "train", "algorithm.mini_batch_questions=3", run_directory(tmp_path / "run"), devices=2
    ).wait()
    late = commands.start(
        "train", write_questions(tmp_path / "q.jsonl", GOOD_QUESTION, "{"), run_directory(tmp_path / "run"), devices=2
    ).wait()
    for result in (early, late):
        assert result.code == 2
        assert re.fullmatch(r"error: .*\n", result.err), result.err
    assert early.seconds < late.seconds
