"""Files of weights: which are read, and which tensor or file the error for a bad directory names."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import model_config, save_model

from nemo_disco.conversion import convert
from nemo_disco.data.rollouts import Rollouts
from nemo_disco.models.weight_files import EMBEDDING, OUTPUT, SafetensorReader
from nemo_disco.policy import parallel
from nemo_disco.policy.policy import Policy
from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.safetensor_writer import save_tensors, write_safetensors

Change = Callable[[Path, dict[str, torch.Tensor]], None]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("whole"), "llama", tied=True)


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "model")


def split_weights(directory: Path) -> list[str]:
    """Split the weights into several files with an index; returns the files' names."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    plan = [(name, tuple(t.shape), t.dtype) for name, t in tensors.items()]
    write_safetensors(directory, plan, tensors.items(), shard_bytes=200_000)
    return sorted(p.name for p in directory.glob("model-*.safetensors"))


def load_policy(directory: Path) -> Policy:
    config = model_config(directory)
    parallel.start(config)
    return Policy(config, trainable=False)


def assert_loads(directory: Path, original: Path) -> None:
    expected = load_file(original / "model.safetensors")
    assert {
        name: bool((w == expected[name]).all()) for name, w in load_policy(directory).named_weights()
    } == dict.fromkeys(expected, True)


@pytest.mark.parametrize("indexed", [True, False])
def test_stray_files_beside_the_model_are_not_read(indexed: bool, model: Path, original: Path) -> None:
    if indexed:
        assert len(split_weights(model)) > 2
    for name in ("consolidated.safetensors", "optimizer.safetensors", "model-00001-of-00099.safetensors"):
        save_file({"optimizer.state": torch.zeros(3)}, model / name)
    (model / "consolidated.00.pth").write_bytes(b"x")
    assert_loads(model, original)


def test_shards_without_an_index_are_read(model: Path, original: Path) -> None:
    names = split_weights(model)
    (model / "model.safetensors.index.json").unlink()
    save_file({"x": torch.zeros(1)}, model / "consolidated.safetensors")
    assert_loads(model, original)
    (model / names[1]).unlink()
    with pytest.raises(UserError, match=rf"{names[1]} missing \(1 of {len(names)} files of weights\)"):
        SafetensorReader(model)


def test_a_missing_shard_is_named_by_file(model: Path) -> None:
    names = split_weights(model)
    (model / names[0]).unlink()
    with pytest.raises(UserError, match=rf"{names[0]} missing \(1 of {len(names)} files of weights\); fetch it again"):
        SafetensorReader(model)


@pytest.mark.parametrize("indexed", [True, False])
def test_a_tensor_in_two_files_is_refused_with_their_names(indexed: bool, model: Path) -> None:
    first, *_ = split_weights(model)
    if indexed:
        last = sorted(model.glob("model-*.safetensors"))[-1]
        save_file(load_file(last) | {EMBEDDING: torch.zeros(1)}, last)
    else:
        (model / "model.safetensors.index.json").unlink()
        last = model / "weights.safetensors"
        save_file({EMBEDDING: torch.zeros(1)}, last)
    with pytest.raises(UserError, match=rf"embed_tokens\.weight is in {first} and in {last.name}; remove"):
        SafetensorReader(model)


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": {"a": "../x.safetensors"}}', '{"weight_map": {"a": 1}}'])
def test_a_damaged_index_is_named(index: str, model: Path) -> None:
    split_weights(model)
    (model / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match=r"safetensors\.index\.json: .*fetch it again$"):
        SafetensorReader(model)


def test_the_angles_that_old_llama_files_hold_are_left_out(model: Path, original: Path, tmp_path: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    angles = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.zeros(4) for i in range(4)}
    save_file(tensors | angles, model / "model.safetensors")
    assert_loads(model, original)
    convert.hf_to_megatron(model, tmp_path / "megatron")


def test_an_output_layer_that_repeats_the_embedding_is_accepted(model: Path, original: Path, tmp_path: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    save_file(tensors | {OUTPUT: tensors[EMBEDDING].clone()}, model / "model.safetensors")
    assert_loads(model, original)
    convert.hf_to_megatron(model, tmp_path / "megatron")


def _add_bias(_: Path, tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.self_attn.o_proj.bias"] = torch.zeros(64)


def _remove_weight(_: Path, tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.1.mlp.up_proj.weight"]


def _change_output(_: Path, tensors: dict[str, torch.Tensor]) -> None:
    tensors[OUTPUT] = tensors[EMBEDDING].clone()
    tensors[OUTPUT][-1, -1] += 1e-3


def _shorten_output(_: Path, tensors: dict[str, torch.Tensor]) -> None:
    tensors[OUTPUT] = tensors[EMBEDDING][:-1].clone()


def _use_integers(_: Path, tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)


def _use_float8(_: Path, tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (_add_bias, r"unexpected model\.layers\.0\.self_attn\.o_proj\.bias \(1\)"),
        (_remove_weight, r"missing model\.layers\.1\.mlp\.up_proj\.weight \(1\)"),
        (_change_output, r"lm_head\.weight differs from model\.embed_tokens\.weight.*tie_word_embeddings"),
        (_shorten_output, r"lm_head\.weight differs from model\.embed_tokens\.weight"),
        (_use_integers, r"model\.norm\.weight is of type I8.*unquantized"),
        (_use_float8, r"up_proj\.weight is of type F8_E4M3.*unquantized"),
    ],
)
def test_weights_of_another_network_are_refused_by_name(
    change: Change, complaint: str, model: Path, tmp_path: Path
) -> None:
    tensors = load_file(model / "model.safetensors")
    change(model, tensors)
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(UserError, match=complaint):
        load_policy(model)
    with pytest.raises(UserError, match=complaint):
        convert.hf_to_megatron(model, tmp_path / "megatron")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("consolidated.safetensors", "its maker's own code: fetch the model-"),
        ("consolidated.00.pth", "its maker's own code: fetch the model-"),
        ("model-Q8_0.gguf", "GGUF file, made for llama.cpp"),
        ("pytorch_model.bin", "pickled and is not opened: convert it to safetensors"),
        ("tf_model.h5", "convert it to safetensors"),
        ("README.md", "fetch them"),
    ],
)
def test_a_directory_without_safetensors_says_what_it_has(name: str, hint: str, model: Path) -> None:
    (model / "model.safetensors").rename(model / name)
    with pytest.raises(UserError, match=rf"no \*\.safetensors file of the model there: .*{hint}"):
        SafetensorReader(model)


def test_a_git_lfs_pointer_is_named(model: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (model / "model.safetensors").write_text(text)
    with pytest.raises(UserError, match=r"model\.safetensors: a Git LFS pointer.*git lfs pull"):
        SafetensorReader(model)


@pytest.fixture(params=[0o022, 0o027])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    """The umask of this process during the test."""
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def assert_modes(root: Path, umask: int) -> None:
    for path in (root, *root.rglob("*")):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert oct(mode) == oct((0o777 if path.is_dir() else 0o666) & ~umask), path


def test_written_files_have_the_permissions_of_the_umask(model: Path, umask: int, tmp_path: Path) -> None:
    (model / "additional_chat_templates").mkdir(mode=0o700)
    for name in ("tokenizer.json", "tokenization_own.py", "additional_chat_templates/tools.jinja"):
        (model / name).write_text(name)
        (model / name).chmod(0o600)
    tmp_path = tmp_path / "out"
    tmp_path.mkdir()
    load_policy(model).export(tmp_path / "export")
    convert.hf_to_megatron(model, tmp_path / "megatron")
    convert.megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    convert.hf_to_nemo(model, tmp_path / "nemo")
    save_tensors({"a": torch.zeros(2, 3).T, "b": torch.ones(1).bool()}, tmp_path / "gradients.safetensors")
    Rollouts.pack([[1]], [[2]], [[0.0]], [0], [False]).save(tmp_path / "rollouts.safetensors")
    assert_modes(tmp_path, umask)
    for directory in ("export", "back"):
        copied = {str(p.relative_to(tmp_path / directory)) for p in (tmp_path / directory).rglob("*")}
        assert copied > {"tokenizer.json", "tokenization_own.py", "additional_chat_templates/tools.jinja"}


def test_tensors_of_any_type_come_back(tmp_path: Path) -> None:
    types = (torch.uint8, torch.bfloat16, torch.float64, torch.bool, torch.int64, torch.float32)
    tensors = {str(t): torch.arange(3).to(t) for t in types} | {"scalar": torch.tensor(2.0), "empty": torch.zeros(0, 4)}
    save_tensors(tensors, tmp_path / "x.safetensors")
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == tensors.keys() and all(torch.equal(loaded[n], tensors[n]) for n in tensors)
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_an_export_of_several_shards_has_an_index(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nemo_disco.models.weight_files.write_safetensors", _write_small_shards)
    load_policy(model).export(tmp_path / "export")
    index = json.loads((tmp_path / "export/model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert_loads(tmp_path / "export", model)


def _write_small_shards(directory: Path, plan, tensors) -> None:  # type: ignore[no-untyped-def]
    write_safetensors(directory, plan, tensors, shard_bytes=200_000)
