"""Descriptions of architectures: no other code names a model_type, and their weights are as in both libraries."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from real_configs import REAL_CONFIGS
from tiny_models import FAMILIES, VARIANTS, by_file_name, model_config, save_family
from transformers import AutoConfig, AutoModelForCausalLM

import nemo_disco
from nemo_disco.models.architecture import ARCHITECTURES, Architecture
from nemo_disco.models.hf_config import read_hf_config
from nemo_disco.models.shape import model_shape, published_name, read_shape
from nemo_disco.models.weight_layout import shard, unshard
from nemo_disco.policy import parallel
from nemo_disco.policy.policy import Policy

PACKAGE = Path(nemo_disco.__file__).parent


@pytest.fixture(params=[*FAMILIES, *VARIANTS])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return save_family(tmp_path, request.param)


def string_constants(file: Path) -> Iterator[str]:
    """The string constants of a source file, without its docstrings."""
    tree = ast.parse(file.read_text())
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


def test_no_file_outside_models_names_a_model_type() -> None:
    names = re.compile(rf"\b({'|'.join(ARCHITECTURES)})\b")
    files = {file for file in PACKAGE.rglob("*.py") if any(names.search(text) for text in string_constants(file))}
    assert PACKAGE / "models" / "architecture.py" in files
    assert {file.relative_to(PACKAGE).parts[0] for file in files} == {"models"}


def test_every_architecture_is_among_the_tested_ones() -> None:
    assert {family.split("-")[0] for family in FAMILIES} == ARCHITECTURES.keys()
    assert {config["model_type"] for config in REAL_CONFIGS.values()} == ARCHITECTURES.keys()


def test_names_and_shapes_are_transformers(directory: Path) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    kind = model.config.model_type
    expected = {name: tuple(tensor.shape) for name, tensor in by_file_name(model.state_dict(), kind).items()}
    shape = read_shape(directory)
    assert shape.tied == (model.lm_head.weight is model.model.embed_tokens.weight)
    if shape.tied:
        expected.pop("lm_head.weight")
    assert shape.tensors() == expected
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    layer = by_file_name({n: p for n, p in model.named_parameters() if n.startswith("model.layers.1.")}, kind)
    assert shape.layer_parameters == sum(p.numel() for p in layer.values())
    whole = ("o_proj.bias", "down_proj.bias", ".gate.weight")
    split = ("q_norm.weight", "k_norm.weight") if kind == "olmo2" else ()  # over all heads, which ranks share
    assert shape.whole_parameters == sum(
        p.numel() for n, p in layer.items() if ("norm" in n and not n.endswith(split)) or n.endswith(whole)
    )
    idle = [f".experts.{expert}." for expert in range(shape.experts_per_token, shape.experts)]
    active = {name: p for name, p in layer.items() if not any(part in name for part in idle)}
    assert shape.matrix_parameters == sum(p.numel() for p in active.values() if p.dim() == 2)
    assert shape.parameters - shape.active_parameters == shape.layers * sum(
        p.numel() for name, p in layer.items() if name not in active
    )


def test_names_shapes_and_cuts_are_megatrons(directory: Path) -> None:
    config = model_config(directory)
    parallel.start(config)
    (chunk,) = Policy(config, trainable=False, read_weights=False).model.chunks
    expected = {
        name: (tuple(p.shape), p.partition_dim if getattr(p, "tensor_model_parallel", False) else None)
        for name, p in chunk.named_parameters()
    }
    actual = {w.full_name(w.local_key): (w.shape, w.split) for w in read_shape(directory).weights()}
    assert actual == expected


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_shards_come_back_whole_bit_for_bit(directory: Path, ranks: int) -> None:
    """The number of rows of the vocabulary is not a multiple of 4."""
    for weight in read_shape(directory).weights():
        parts = {name: torch.randn(shape) for name, shape in weight.parts}
        shards = [shard(weight, [*parts.values()], rank, ranks) for rank in range(ranks)]
        whole = dict(unshard(weight, shards))
        assert whole.keys() == parts.keys()
        assert all(torch.equal(whole[name], parts[name]) for name in parts), weight.key


def test_a_rank_has_whole_groups_of_heads_and_both_halves_of_the_mlp() -> None:
    shape = model_shape(REAL_CONFIGS["Qwen2.5-0.5B"])
    sizes = {"hidden": 32, "ffn": 24, "heads": 8, "kv_heads": 4, "head_dim": 4}
    weights = {w.key.split(".", 2)[2]: w for w in replace(shape, layers=1, **sizes).weights() if w.layer == 0}
    for kind in ("weight", "bias"):
        qkv = weights[f"self_attention.linear_qkv.{kind}"]
        q, k, v = parts = [torch.randn(part) for _, part in qkv.parts]
        rows = [q[16:24], k[8:12], v[8:12], q[24:32], k[12:16], v[12:16]]  # groups 2 and 3, of two queries each
        assert torch.equal(shard(qkv, parts, rank=1, ranks=2), torch.cat(rows))
    gate_up = weights["mlp.linear_fc1.weight"]
    gate, up = parts = [torch.randn(part) for _, part in gate_up.parts]
    assert torch.equal(shard(gate_up, parts, rank=1, ranks=2), torch.cat([gate[12:], up[12:]]))


def test_one_description_adds_an_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This one has biases and norms of queries and keys, and its configs may leave out the size of a head."""
    new = Architecture("new", "New", {}, qkv_bias=True, qk_norm=True, absent={"head_dim": 16}, rope_theta=5e5)
    monkeypatch.setitem(ARCHITECTURES, "new", new)
    config = {k: v for k, v in REAL_CONFIGS["Qwen2.5-0.5B"].items() if k != "rope_theta"}
    config |= {"model_type": "new", "architectures": ["NewForCausalLM"], "sliding_window": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_hf_config(tmp_path)["rope_theta"] == 5e5
    shape = read_shape(tmp_path)
    names = {name.removeprefix("model.layers.0.self_attn.") for name in shape.tensors()}
    assert {"q_proj.bias", "q_norm.weight", "k_norm.weight"} <= names
    biases, norms = 16 * (14 + 2 + 2), 2 * 16
    plain = replace(shape, architecture=replace(new, qkv_bias=False, qk_norm=False))
    assert shape.layer_parameters - plain.layer_parameters == biases + norms


@pytest.mark.parametrize(
    ("model", "name"),
    [("DeepSeek-R1-Distill-Qwen-1.5B", "DeepSeek-R1-Distill-Qwen-1.5B"), ("Qwen2.5-0.5B", None)],
)
def test_a_published_model_is_known_by_its_shape(model: str, name: str | None, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(REAL_CONFIGS[model]))
    assert published_name(read_shape(tmp_path)) == name
