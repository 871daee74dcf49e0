"""The quickstart assets are as their README.md says: held-out test questions, right answers, a byte-level tokenizer,
and a small model whose shape TP 4 and PP 4 divide."""

import json
import unicodedata
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoTokenizer, Qwen2ForCausalLM

from tools.quickstart import make_assets, task, warm_start

ASSETS = Path(__file__).parents[2] / "assets" / "quickstart"
MODEL = ASSETS / "model"


def read_rows(name):
    return [json.loads(line) for line in (ASSETS / name).read_text().splitlines()]


def sorted_numbers(row):
    """The sorted numbers in a question's text; two questions with the same numbers count as the same."""
    return tuple(sorted(int(n) for n in "".join(c if c.isdigit() else " " for c in row["problem"]).split()))


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def warm_start_problems():
    """Every question that the warm start could have seen, drawn again from the seed."""
    return make_assets.splits(warm_start.Recipe())[3]


def test_no_test_question_is_in_training_in_any_order_or_wording(warm_start_problems):
    test = Counter(sorted_numbers(row) for row in read_rows("test.jsonl"))
    assert len(test) >= 256 and set(test.values()) == {1}
    training = read_rows("train.jsonl") + [p.row() for p in warm_start_problems]
    assert len(training) > 4000
    assert not test.keys() & {sorted_numbers(row) for row in training}


def test_a_held_out_question_in_training_is_refused():
    problems = list(islice(task.stream(1), 20))
    reordered = task.Problem(tuple(reversed(problems[3].numbers)), task.STORIES[0])
    with pytest.raises(ValueError, match="1 held-out problems are in training"):
        task.check_held_out(problems[:5], [*problems[10:], reordered])


def test_the_committed_questions_are_those_of_the_seed():
    test, _, train, _ = make_assets.splits(warm_start.Recipe())
    assert read_rows("test.jsonl") == [p.row() for p in test]
    assert read_rows("train.jsonl") == [p.row() for p in train]


def test_every_answer_is_right():
    for row in read_rows("test.jsonl") + read_rows("train.jsonl"):
        assert int(row["answer"]) == sum(sorted_numbers(row))


def test_every_worked_solution_adds_up_and_ends_in_the_boxed_answer(warm_start_problems):
    for problem in warm_start_problems[:500]:
        thought, _, boxed = problem.solution.partition("\n</think>\n")
        assert boxed == f"\\boxed{{{sum(problem.numbers)}}}"
        for line in thought.splitlines():
            left, _, right = line.partition("=")
            assert sum(int(n) for n in left.split("+")) == int(right)


@pytest.mark.parametrize(
    "text",
    [
        "".join(chr(i) for i in range(256)),
        "Zürich, 日本語, 😀, \u202e, a\u0301",
        "  two  spaces \n\n\n\t tabs \r\n",
        "Find $\\frac{1}{2}$ of 1234567890, <think> and \\boxed{9^{9}} </think>.",
    ],
)
def test_any_text_round_trips_but_for_nfc(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text)


def test_every_byte_is_a_token(tokenizer):
    vocabulary = Tokenizer.from_file(str(MODEL / "tokenizer.json")).get_vocab()
    assert len([t for t in vocabulary if len(t) == 1]) == 256
    assert len(tokenizer) == len(vocabulary) and len(tokenizer) % 8 == 0


@pytest.mark.parametrize("piece", ["<|im_start|>", "<|im_end|>", "<think>", "</think>", "\\boxed{", "user", "7"])
def test_the_pieces_of_the_format_are_single_tokens(tokenizer, piece):
    assert len(tokenizer.encode(piece)) == 1


def test_the_chat_template_opens_the_thought(tokenizer):
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "2 + 3?"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|im_start|>user\n2 + 3?<|im_end|>\n<|im_start|>assistant\n<think>\n"
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token not in (None, tokenizer.eos_token)


def test_thinking_survives_decoding_without_special_tokens(tokenizer):
    tokens = tokenizer.encode("2+3=5\n</think>\n\\boxed{5}<|im_end|>")
    assert tokenizer.decode(tokens, skip_special_tokens=True) == "2+3=5\n</think>\n\\boxed{5}"


def test_prompts_and_solutions_are_short(tokenizer, warm_start_problems):
    for p in warm_start_problems[:300]:
        assert len(tokenizer.encode(warm_start.prompt(tokenizer, p))) <= 64
        assert len(tokenizer.encode(p.solution)) < warm_start.MAX_RESPONSE


def test_the_shape_divides_by_tp_4_and_pp_4(tokenizer):
    config = json.loads((MODEL / "config.json").read_text())
    for key in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size"):
        assert config[key] % 4 == 0, key
    assert config["model_type"] == "qwen2" and config["tie_word_embeddings"]
    assert config["vocab_size"] == len(tokenizer) and config["eos_token_id"] == tokenizer.eos_token_id


def test_the_weights_are_a_few_megabytes_of_finite_fp32():
    path = MODEL / "model.safetensors"
    assert path.stat().st_size < 8e6
    with safe_open(path, "pt") as weights:
        for name in weights.keys():  # noqa: SIM118
            tensor = weights.get_tensor(name)
            assert tensor.dtype == torch.float32 and tensor.isfinite().all(), name


def test_the_warm_start_is_right_sometimes_but_not_often(tokenizer):
    """Pass@1 on 64 test questions of 4 samples each is within four standard errors of README.md's, and can double."""
    torch.manual_seed(0)
    problems = make_assets.splits(warm_start.Recipe())[0][:64]
    model = Qwen2ForCausalLM.from_pretrained(MODEL)
    assert 0.15 < warm_start.sample_verdicts(model, tokenizer, problems, 4, 1.0).mean().item() < 0.55
