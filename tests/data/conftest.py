"""Fixtures: a byte-level tokenizer directory, a writer of question files, and the papers' files if they are there."""

import json
import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from nemo_disco.data.tokenizer import load_tokenizer

REPO = Path(__file__).resolve().parents[2]
PAPER_DATA = Path(os.environ.get("NEMO_DISCO_PAPER_DATA", REPO.parent / "shared" / "data")) / "deepscaler"
collect_ignore = [] if PAPER_DATA.is_dir() else ["test_paper_data.py"]

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('system first') }}"
    "{% endif %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def tokenizer_dir(tmp_path):
    """Directory of a tokenizer of 256 bytes, EOS (256) and `</think>` (257).

    Encoding without a chat template puts EOS first, as Llama's tokenizer puts BOS.
    """
    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|end|>"])
    backend.post_processor = processors.TemplateProcessing(single="<|end|> $A", special_tokens=[("<|end|>", 256)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["</think>"]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def paper_data():
    return PAPER_DATA


@pytest.fixture
def tokenizer(tokenizer_dir):
    return load_tokenizer(tokenizer_dir)


@pytest.fixture
def write(tmp_path):
    """A function that writes a question file: bytes or text unchanged, a list as JSON or JSONL by the file's suffix."""

    def write_file(name, content):
        path = tmp_path / name
        if isinstance(content, list):
            lines = [json.dumps(record) for record in content]
            content = "\n".join(lines) if name.endswith(".jsonl") else json.dumps(content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write_file
