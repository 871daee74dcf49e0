"""An exported model is the same model to transformers 4 (and to engines that pin it) as to transformers 5."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import LLAMA3_ROPE, model_config, save_model
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from nemo_disco.config.paths import packaged_directory
from nemo_disco.conversion import convert
from nemo_disco.data.tokenizer import PROBES, load_tokenizer
from nemo_disco.models.weight_files import copy_companions
from nemo_disco.policy import parallel
from nemo_disco.policy.policy import Policy
from nemo_disco.runtime.errors import UserError

pytestmark = pytest.mark.transformers4

PYTHON = Path(__file__).parents[2] / ".venv-transformers4/bin/python"
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 500000.0},
    "linear": {"rope_type": "linear", "rope_theta": 700.0, "factor": 4.0},
    "llama3": LLAMA3_ROPE,
}
WRITERS = ("export", "megatron", "nemo")
CASES = [
    (family, rope, writer)
    for family, ropes in {"qwen2": ROPES, "qwen3": ROPES, "mistral": ROPES, "llama": ROPES}.items()
    for rope in ropes
    for writer in WRITERS
    if writer != "nemo" or rope == "default" or (family, rope) == ("llama", "llama3")  # NeMo has no other rope
]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with each case's model as transformers 5 saves it (source-*) and as nemo_disco writes it, with the
    logits that transformers 4 computes for each."""
    root = tmp_path_factory.mktemp("work")
    save_file({"ids": torch.randint(0, 130, (1, 150), generator=torch.Generator().manual_seed(1))}, root / "ids")
    for family, rope, writer in CASES:
        source = root / f"source-{family}-{rope}"
        if not source.exists():
            save_model(source, family, tied=False)
            fields = json.loads((source / "config.json").read_text()) | {"rope_parameters": ROPES[rope]}
            (source / "config.json").write_text(json.dumps(fields))
        write(source, root / f"{family}-{rope}-{writer}", writer)
    directories = sorted(p for p in root.iterdir() if (p / "config.json").is_file())
    run_transformers_4("write_logits.py", root / "ids", directories)
    return root


def run_transformers_4(script: str, input_file: Path, directories: list[Path]) -> None:
    """Run a script of this directory in the environment of transformers 4."""
    command = [PYTHON, Path(__file__).with_name(script), input_file, *directories]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def write(source: Path, out: Path, writer: str) -> None:
    """Write the model as Hugging Face files: by a policy's export, or through a Megatron or NeMo checkpoint."""
    if writer == "export":
        config = model_config(source)
        parallel.start(config)
        Policy(config, trainable=False).export(out)
    elif writer == "megatron":
        convert.megatron_to_hf(convert.hf_to_megatron(source, out.with_name(f"{out.name}.checkpoint")), out)
    else:
        convert.nemo_to_hf(convert.hf_to_nemo(source, out.with_name(f"{out.name}.checkpoint")), out)


def logits_by_transformers_4(directory: Path) -> torch.Tensor:
    """Logits [1, 150, v] that transformers 4 has computed for the model."""
    return load_file(directory.with_name(f"{directory.name}.logits.safetensors"))["logits"]


def logits_by_transformers_5(directory: Path, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = AutoModelForCausalLM.from_pretrained(directory)(ids).logits
    return logits


@pytest.mark.parametrize(("family", "rope", "writer"), CASES, ids="-".join)
def test_transformers_4_and_5_compute_the_same(family: str, rope: str, writer: str, work: Path) -> None:
    ids, export = load_file(work / "ids")["ids"], work / f"{family}-{rope}-{writer}"
    expected = logits_by_transformers_5(work / f"source-{family}-{rope}", ids)
    torch.testing.assert_close(logits_by_transformers_5(export, ids), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(logits_by_transformers_4(export), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("rope", ROPES)
def test_a_config_saved_by_transformers_5_is_another_model_to_transformers_4(rope: str, work: Path) -> None:
    """This is why exports spell the RoPE settings in both ways. When this test fails, one way is enough."""
    source = work / f"source-qwen2-{rope}"
    expected = logits_by_transformers_5(source, load_file(work / "ids")["ids"])
    assert float((logits_by_transformers_4(source) - expected).abs().max()) > 0.1


def test_transformers_4_and_5_read_the_same_tokenizer(tmp_path: Path) -> None:
    """The first directory names a tokenizer class that both versions know, the second a class of version 5."""
    source = packaged_directory("assets") / "quickstart/model"
    PreTrainedTokenizerFast.from_pretrained(source).save_pretrained(tmp_path / "saved")
    exports = [tmp_path / name for name in ("qwen2", "own")]
    for directory, export in zip((source, tmp_path / "saved"), exports, strict=True):
        copy_companions(directory, export, {"model_type": "qwen2"})
    texts = [*PROBES, "<|im_start|>user<think>1</think><|im_end|>"]
    (tmp_path / "texts").write_text(json.dumps(texts))
    run_transformers_4("write_tokens.py", tmp_path / "texts", exports)
    tokenizer = load_tokenizer(source)
    for export in exports:
        record = json.loads(export.with_name(f"{export.name}.tokens.json").read_text())
        assert record["ids"] == tokenizer(texts, add_special_tokens=False)["input_ids"]
        assert record["special"] == sorted(tokenizer.all_special_tokens)
        question = [{"role": "user", "content": "1 + 1?"}]
        assert record["prompt"] == tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)


def test_an_unknown_rope_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    source = save_model(tmp_path / "model", "qwen2", tied=False)
    fields = json.loads((source / "config.json").read_text())
    fields["rope_parameters"] |= {"rope_type": "ntk"}
    (source / "config.json").write_text(json.dumps(fields))
    for writer in WRITERS:
        with pytest.raises(UserError, match="rope_type 'ntk' is not built"):
            write(source, tmp_path / "out", writer)
