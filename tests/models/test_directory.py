"""Paths that are no Hugging Face model: the error says what the path is and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from nemo_disco.models.hf_config import read_hf_config
from nemo_disco.runtime.errors import UserError


def make_files(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("{}")
    return root


@pytest.mark.parametrize(
    ("files", "hint"),
    [
        (["adapter_config.json", "adapter_model.safetensors"], "a LoRA adapter .* merge_and_unload"),
        (["adapter_config.json", "config.json", "model.safetensors"], "a LoRA adapter .* merge_and_unload"),
        (["model-Q4_K_M.gguf", "README.md"], r"model-Q4_K_M\.gguf is a GGUF file.*it was made from"),
        (["refs/main", "snapshots/abc/config.json"], "place in the Hugging Face cache; give .*/snapshots/abc$"),
        (["models--a--b/snapshots/abc/config.json", "models--c--d/refs/main"], "cache, with 2 models in it.*abc$"),
        (["hub/models--a--b/snapshots/abc/config.json", "token"], "cache, with 1 models in it.*/hub/models--a--b/"),
        (["checkpoint.json", "__0_0.distcp"], "a checkpoint.*megatron_to_hf"),
        (["config.yaml", "metrics.jsonl", "export/config.json"], "directory of a run.*trained model is .*/export$"),
        (["config.yaml", "metrics.jsonl"], "directory of a run.*no export/ yet"),
        (["model/config.json", "README.md"], "there is one in .*/model: give that directory"),
        (["params.json", "consolidated.safetensors", "tekken.json"], "params.json is of Mistral's or Meta's own"),
        (["README.md"], "no config.json"),
    ],
)  # fmt: skip
def test_a_directory_without_a_model(files: Iterable[str], hint: str, tmp_path: Path) -> None:
    directory = make_files(tmp_path, *files)
    with pytest.raises(UserError, match=hint) as error:
        read_hf_config(directory)
    assert str(error.value).startswith(f"{directory}: ") and "\n" not in str(error.value)


def test_a_path_in_the_directory_for_models_is_not_taken_for_a_name_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"Qwen3-0.6B: no Hugging Face model there: no such directory"):
        read_hf_config("models/Qwen3-0.6B")


def test_a_path_that_is_no_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_files(tmp_path, "models/x.gguf", "models/model.safetensors")
    for path, hint in {
        "Qwen/Qwen3-0.6B": "nothing is downloaded here, so `hf download Qwen/Qwen3-0.6B --local-dir models/Qwen3-0.6B`",
        "models/typo": "no such directory; docs/model.md says how to get one",
        "nowhere": "no such directory; docs/model.md says how to get one",
        "models/x.gguf": "a GGUF file",
        "models/model.safetensors": r"a file; give the Hugging Face directory that it is in \(models\)",
        "x" * 300: "cannot be read",
    }.items():
        with pytest.raises(UserError, match=hint) as error:
            read_hf_config(path)
        assert str(error.value).startswith(path)
