"""Prompts, decoding, token widths and stop tokens, and the errors for an incomplete tokenizer directory."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nemo_disco.data.chat import decode, encode_prompts, token_widths
from nemo_disco.data.question_fields import Message
from nemo_disco.data.questions import Question
from nemo_disco.data.tokenizer import load_tokenizer, stop_token_ids
from nemo_disco.runtime.errors import UserError

EOS, THINK = 256, 257


def make_question(text, number=1):
    return Question(number, text, ("2",), f"q.json, record {number}")


def encode(tokenizer, *questions, suffix="", limit=1000, too_long="error"):
    return encode_prompts(tokenizer, questions, suffix, limit, too_long)


def edit(path, **changes):
    """Change keys of a JSON file; None removes a key."""
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def test_a_prompt_is_the_template_up_to_the_response(tokenizer):
    question = Question(1, (Message("system", "Be brief."), Message("user", "1+1?")), ("2",), "")
    (prompt,), notes = encode(tokenizer, question)
    assert tokenizer.decode(prompt.token_ids) == "<system>Be brief.\n<user>1+1?\n<assistant>"
    assert prompt.question is question and notes == []
    assert all(type(i) is int for i in prompt.token_ids)


def test_token_ids_are_those_of_transformers_own_template_call(tokenizer):
    (prompt,), _ = encode(tokenizer, make_question("Größe? 数"))
    expected = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Größe? 数"}], add_generation_prompt=True, return_dict=False
    )
    assert prompt.token_ids == expected


@pytest.mark.parametrize(
    ("text", "suffix", "turn"),
    [
        ("1+1?", "Think.", "1+1? Think."),
        ("1+1?", "\nThink.", "1+1?\nThink."),
        ("1+1? ", "Think.", "1+1?  Think."),
        ("1+1? Think.", "Think.", "1+1? Think."),
        ("1+1?\nThink.\n", "\nThink.", "1+1?\nThink.\n"),
        ("1+1?", "", "1+1?"),
    ],
)
def test_the_suffix_is_appended_to_the_last_user_turn_once(tokenizer, text, suffix, turn):
    turns = (Message("user", "0?"), Message("assistant", "0"), Message("user", text))
    prompts, _ = encode(tokenizer, make_question(text), Question(2, turns, ("2",), ""), suffix=suffix)
    assert tokenizer.decode(prompts[0].token_ids) == f"<user>{turn}\n<assistant>"
    assert tokenizer.decode(prompts[1].token_ids) == f"<user>0?\n<assistant>0\n<user>{turn}\n<assistant>"


def test_a_prompt_over_the_limit_is_refused_or_dropped_and_named(tokenizer):
    fits, over = make_question("x" * 9, 1), make_question("x" * 10, 2)  # the template adds 18 tokens
    with pytest.raises(UserError, match=r"q\.json, record 2: the prompt has 28 tokens, data\.max_prompt_length is 27"):
        encode(tokenizer, fits, over, limit=27)
    prompts, (note,) = encode(tokenizer, fits, over, limit=27, too_long="drop")
    assert [p.question for p in prompts] == [fits]
    assert note.startswith("1 of 2 questions left out") and note.endswith("q.json, record 2 (28)")
    assert encode(tokenizer, fits, over, limit=28)[1] == []


def test_dropping_every_question_is_refused(tokenizer):
    with pytest.raises(UserError, match=r"2 of 2 questions are over it, the longest has 30 tokens\); raise it$"):
        encode(tokenizer, make_question("x" * 10), make_question("x" * 12), limit=20, too_long="drop")


def test_no_questions_make_no_prompts(tokenizer):
    assert encode(tokenizer) == ([], [])


def test_a_conversation_refused_by_the_template_is_named(tokenizer):
    turns = (Message("user", "a"), Message("system", "b"), Message("user", "c"))
    with pytest.raises(UserError, match="record 7: the tokenizer's chat template refuses this question: system first"):
        encode(tokenizer, Question(7, turns, ("2",), "q.json, record 7"))


def test_an_empty_prompt_is_refused(tokenizer):
    tokenizer.chat_template = "{{ '' }}"
    with pytest.raises(UserError, match=r"q\.json, record 1: the tokenizer's chat template returns no text"):
        encode(tokenizer, make_question("?"))


def test_decoding_keeps_special_tokens_and_spaces(tokenizer):
    before, after = tokenizer(["1 , 2 .", "é"], add_special_tokens=False)["input_ids"]
    ids = [*before, THINK, *after]
    assert decode(tokenizer, ids) == "1 , 2 .</think>é"
    assert decode(tokenizer, []) == ""


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, (EOS,)),
        ({}, (EOS,)),
        ({"eos_token_id": None}, (EOS,)),
        ({"eos_token_id": EOS}, (EOS,)),
        ({"eos_token_id": [THINK, 3]}, (3, EOS, THINK)),
    ],
)
def test_stop_tokens_come_from_the_tokenizer_and_the_generation_config(tokenizer, tmp_path, config, expected):
    if config is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(config))
    assert stop_token_ids(tokenizer, tmp_path) == expected


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "not valid JSON"),
        ("[]", "not a JSON object"),
        ('{"eos_token_id": "</s>"}', "`eos_token_id` is </s>"),
        ('{"eos_token_id": [258]}', "the tokenizer has ids from 0 to 257"),
        ('{"eos_token_id": -1}', "the tokenizer has ids from 0 to 257"),
    ],
)
def test_a_broken_generation_config_is_named(tokenizer, tmp_path, content, complaint):
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(UserError) as error:
        stop_token_ids(tokenizer, tmp_path)
    assert "generation_config.json: " in str(error.value) and complaint in str(error.value)


def test_a_tokenizer_without_eos_is_refused(tokenizer_dir):
    edit(tokenizer_dir / "tokenizer_config.json", eos_token=None)
    with pytest.raises(UserError, match=r"no EOS token; set `eos_token` in tokenizer_config\.json"):
        load_tokenizer(tokenizer_dir)


def test_a_tokenizer_without_a_chat_template_is_refused(tokenizer_dir):
    (tokenizer_dir / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match=r"no chat template; put one in chat_template\.jinja"):
        load_tokenizer(tokenizer_dir)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"no tokenizer there; fetch its tokenizer\.json"),
        ("", r"no usable tokenizer there: .*it needs a sound tokenizer\.json"),
        ('{"a":', r"no usable tokenizer there: .*it needs a sound tokenizer\.json"),
        ('{"model": {"type": "BPE"}}', r"no usable tokenizer there: .*it needs a sound tokenizer\.json"),
    ],
)
def test_a_missing_or_corrupt_tokenizer_is_refused(tokenizer_dir, content, message):
    file = tokenizer_dir / "tokenizer.json"
    file.unlink() if content is None else file.write_text(content)
    with pytest.raises(UserError, match=message) as error:
        load_tokenizer(tokenizer_dir)
    assert "\n" not in str(error.value)


def test_a_missing_model_directory_is_not_searched_on_the_hub(tmp_path):
    with pytest.raises(UserError, match="gpt2: there is no such directory"):
        load_tokenizer(tmp_path / "gpt2")


def test_code_in_a_model_directory_runs_only_with_trust_remote_code(tokenizer_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    marker = tokenizer_dir / "ran"
    code = (
        f"open({str(marker)!r}, 'w').close()\n"
        "from transformers import PreTrainedTokenizerFast\nclass Own(PreTrainedTokenizerFast): pass\n"
    )
    (tokenizer_dir / "own.py").write_text(code)
    edit(
        tokenizer_dir / "tokenizer_config.json",
        tokenizer_class="Own",
        backend=None,
        auto_map={"AutoTokenizer": [None, "own.Own"]},
    )
    with pytest.raises(UserError, match=r"set model\.trust_remote_code=true if you trust it"):
        load_tokenizer(tokenizer_dir)
    assert not marker.exists()
    assert type(load_tokenizer(tokenizer_dir, trust_remote_code=True)).__name__ == "Own" and marker.exists()


@pytest.mark.parametrize("text", ["1+1=2</think> 2", "Größe 数 🙂!", "", "a🙂"])
def test_token_widths_add_up_to_the_text(tokenizer, text):
    """A character of several bytes belongs to the token that completes it."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    widths = token_widths(tokenizer, ids, text)
    assert len(widths) == len(ids) and sum(widths) == len(text)
    ends = [sum(widths[: i + 1]) for i in range(len(ids))]
    for i, end in enumerate(ends):
        assert text[:end] == tokenizer.decode(ids[: i + 1]).rstrip("\ufffd")


def test_token_widths_cover_bytes_of_incomplete_characters(tokenizer):
    ids = tokenizer("数数a", add_special_tokens=False)["input_ids"]
    for broken in (ids[1:], ids[:-2], [*ids[:2], *ids[3:]]):
        text = tokenizer.decode(broken)
        widths = token_widths(tokenizer, broken, text)
        assert "\ufffd" in text and len(widths) == len(broken) and sum(widths) == len(text)


def test_token_widths_omit_the_leading_space_of_sentencepiece():
    vocab = {"<unk>": 0, "▁a": 1, "▁is": 2, "b": 3, "<0xE6>": 4, "<0x95>": 5, "<0xB0>": 6}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    strip = decoders.Strip(content=" ", left=1, right=0)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    backend.decoder = decoders.Sequence(parts)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    ids = [1, 3, 2, 4, 5, 6, 3]
    assert tokenizer.decode(ids) == "ab is数b"
    assert token_widths(tokenizer, ids, "ab is数b") == [1, 1, 3, 0, 0, 1, 1]


def test_there_are_no_widths_for_another_text(tokenizer):
    assert token_widths(tokenizer, tokenizer("abc", add_special_tokens=False)["input_ids"], "abd") is None
