"""The loaded tokenizer is that of tokenizer.json; its stop tokens and its vocabulary fit the model."""

import json
import logging

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from nemo_disco.data.chat import decode, encode_prompts
from nemo_disco.data.questions import Question
from nemo_disco.data.tokenizer import load_tokenizer, stop_token_ids, vocabulary_size
from nemo_disco.models.weight_files import copy_companions
from nemo_disco.runtime.errors import UserError

EOS, THINK = 256, 257
TEXT = "def f(x):\n    return 12345 + x  # é 数 🙂</think>"
EMPTY = {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}}
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@pytest.fixture
def llama_dir(tmp_path):
    """A directory like DeepSeek-R1-Distill-Llama-8B's: a byte-level tokenizer.json with Llama's class in its config."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["def f(x): return x + 1\n", "What is 12345 + 678?"] * 20, trainer)
    backend.add_special_tokens(["<|User|>", "<|Assistant|>"])
    backend.add_tokens(["<think>", "</think>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    config = {
        "tokenizer_class": "LlamaTokenizerFast",
        "bos_token": "<|begin|>",
        "eos_token": "<|end|>",
        "legacy": True,
        "chat_template": "{{ bos_token }}{% for m in messages %}<|User|>{{ m.content }}{% endfor %}<|Assistant|>",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    return tmp_path


def test_a_tokenizer_that_transformers_would_change_is_loaded_from_its_file(llama_dir, caplog):
    original = Tokenizer.from_file(str(llama_dir / "tokenizer.json"))
    expected = original.encode(TEXT, add_special_tokens=False).ids
    rebuilt = AutoTokenizer.from_pretrained(llama_dir, local_files_only=True)
    assert rebuilt(TEXT, add_special_tokens=False)["input_ids"] != expected  # otherwise this test would show nothing
    with caplog.at_level(logging.WARNING):
        tokenizer = load_tokenizer(llama_dir)
    (line,) = caplog.messages
    assert f"{llama_dir}/tokenizer.json" in line and "\n" not in line
    assert tokenizer(TEXT, add_special_tokens=False)["input_ids"] == expected
    assert decode(tokenizer, expected) == TEXT
    (prompt,), _ = encode_prompts(tokenizer, [Question(0, "1 + 1?", ("2",), "q")], "", 100, "error")
    text = "<|begin|><|User|>1 + 1?<|Assistant|>"
    assert prompt.token_ids == original.encode(text, add_special_tokens=False).ids
    assert stop_token_ids(tokenizer, llama_dir) == (original.token_to_id("<|end|>"),)


def test_transformers_loads_an_exported_tokenizer_as_the_policy_does(llama_dir, tmp_path_factory, caplog):
    """transformers would change the tokenizer of the original directory. The rest of its configuration is kept."""
    export = tmp_path_factory.mktemp("exported") / "export"
    copy_companions(llama_dir, export, json.loads((llama_dir / "config.json").read_text()))
    original = load_tokenizer(llama_dir)
    exported = AutoTokenizer.from_pretrained(export, local_files_only=True)
    assert exported(TEXT)["input_ids"] == original(TEXT)["input_ids"]
    assert exported.get_vocab() == original.get_vocab()
    assert (exported.bos_token, exported.eos_token) == ("<|begin|>", "<|end|>")
    assert exported.chat_template == original.chat_template
    before, after = (json.loads((d / "tokenizer_config.json").read_text()) for d in (llama_dir, export))
    assert {k for k in before.keys() | after.keys() if before.get(k) != after.get(k)} == {"tokenizer_class"}
    caplog.clear()
    load_tokenizer(export)
    assert caplog.messages == []


def test_an_exported_tokenizer_can_be_read_by_transformers_4(tokenizer_dir, tmp_path):
    """transformers 5 saved the original. The rest of its configuration is kept; a second export gives the same file."""
    name = "tokenizer_config.json"
    before = json.loads((tokenizer_dir / name).read_text())
    assert before.pop("tokenizer_class") == "TokenizersBackend"
    assert before.pop("extra_special_tokens") == ["</think>"]
    copy_companions(tokenizer_dir, tmp_path / "export", {})
    copy_companions(tmp_path / "export", tmp_path / "again", {})
    expected = {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": ["</think>"]}
    assert json.loads((tmp_path / "export" / name).read_text()) == before | expected
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "export" / name).read_bytes()
    original, exported = (load_tokenizer(directory) for directory in (tokenizer_dir, tmp_path / "export"))
    assert exported.all_special_tokens == original.all_special_tokens == ["<|end|>", "</think>"]


def test_a_tokenizer_that_agrees_with_its_file_causes_no_warning(tokenizer_dir, caplog):
    with caplog.at_level(logging.WARNING):
        load_tokenizer(tokenizer_dir)
    assert caplog.messages == []


def test_a_configuration_that_changes_tokenizer_json_is_refused(tokenizer_dir):
    file = tokenizer_dir / "tokenizer_config.json"
    config = json.loads(file.read_text())
    fields = {"content": "a", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    decoder = {str(EOS): fields | {"content": "<|end|>", "special": True}, "258": fields | {"content": "def"}}
    file.write_text(json.dumps(config | {"added_tokens_decoder": decoder}))
    with pytest.raises(UserError, match=r"tokenizer\.json: what transformers loads is another tokenizer .*'def f"):
        load_tokenizer(tokenizer_dir)


@pytest.mark.parametrize(
    ("name", "key", "value", "complaint"),
    [
        ("tokenizer_config.json", "model_max_length", "x", "no usable tokenizer there: '>' not supported"),
        ("tokenizer.json", "post_processor", EMPTY, "makes no tokens of a text"),
        ("tokenizer.json", "model", {"type": "X"}, "no usable tokenizer there: "),
    ],
)  # fmt: skip
def test_an_unusable_tokenizer_is_reported_in_one_line(tokenizer_dir, name, key, value, complaint):
    file = tokenizer_dir / name
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(UserError, match=complaint):
        load_tokenizer(tokenizer_dir)


def test_a_directory_without_a_tokenizer_is_named(tokenizer_dir):
    """transformers would make an empty tokenizer for it."""
    (tokenizer_dir / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"no tokenizer there; fetch its tokenizer\.json"):
        load_tokenizer(tokenizer_dir)


def test_several_chat_templates_need_a_default(tokenizer_dir):
    template = (tokenizer_dir / "chat_template.jinja").read_text()
    (tokenizer_dir / "chat_template.jinja").unlink()
    file = tokenizer_dir / "tokenizer_config.json"
    config = json.loads(file.read_text())
    named = [{"name": name, "template": template} for name in ("rag", "tool_use")]
    file.write_text(json.dumps(config | {"chat_template": named}))
    with pytest.raises(UserError, match=r"several chat templates \(rag, tool_use\) and none is named `default`"):
        load_tokenizer(tokenizer_dir)
    file.write_text(json.dumps(config | {"chat_template": [*named, {"name": "default", "template": template}]}))
    assert load_tokenizer(tokenizer_dir).chat_template["default"] == template


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (None, {"eos_token_id": [EOS, THINK]}, (EOS, THINK)),
        ({}, {"eos_token_id": 3}, (3, EOS)),
        ({"eos_token_id": EOS}, {"eos_token_id": [EOS, THINK]}, (EOS, THINK)),
        ({"eos_token_id": EOS}, {"eos_token_id": 2}, (EOS,)),  # a base model's number, here an ordinary token
    ],
)
def test_eos_ids_of_config_json_are_stop_tokens(tokenizer, tmp_path, generation, config, expected):
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert stop_token_ids(tokenizer, tmp_path) == expected


def test_tokens_beyond_the_embedding_are_named(tokenizer, tmp_path):
    question = Question(0, "1 </think> 2", ("2",), "q.json, record 1")
    assert encode_prompts(tokenizer, [question], "", 100, "error", vocabulary=258)[0]
    with pytest.raises(UserError, match=r"q\.json, record 1: the prompt has token 257 \('</think>'\), .* 257 rows"):
        encode_prompts(tokenizer, [question], "", 100, "error", vocabulary=257)
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 256}))
    with pytest.raises(UserError, match=r"an end of sequence has token 256 \('<\|end\|>'\)"):
        stop_token_ids(tokenizer, tmp_path)


def test_the_vocabulary_ends_with_the_last_token(tokenizer):
    """The last token is `</think>`, an added one."""
    assert vocabulary_size(tokenizer) == 258
