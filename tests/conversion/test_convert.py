"""Conversions to Megatron and NeMo and back are exact for every architecture; input that does not fit is refused."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import StrictHandling
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import VARIANTS, VOCABULARY, model_config, save_family, save_model

from nemo_disco import checkpoint
from nemo_disco.conversion import convert
from nemo_disco.conversion.torch_dist import TorchDistReader, TorchDistWriter
from nemo_disco.models.hf_config import read_hf_config
from nemo_disco.policy import parallel
from nemo_disco.policy.policy import Policy
from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.safetensor_writer import write_safetensors

sys.path.insert(0, str(Path(__file__).parents[2]))

from tools.convert import hf_to_megatron, hf_to_nemo, megatron_to_hf, nemo_to_hf

MODELS = ["qwen2-tied", "qwen2-untied", "qwen3-tied", "qwen3-untied", "llama-untied", "mistral-untied"]


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return add_other_files(save_family(tmp_path / "model", request.param))


@pytest.fixture(autouse=True)
def stop_parallel() -> Iterator[None]:
    """Destroy the process groups after a test."""
    yield
    if dist.is_initialized():
        parallel.stop()


def add_other_files(directory: Path) -> Path:
    """Add the files of a Hugging Face directory that a conversion copies. Returns the directory."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        (directory / name).write_text(f'{{"of": "{name}"}}')
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates/tool_use.jinja").write_text("tools")
    return directory


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a directory's safetensors files, by name."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def assert_same(source: Path, converted: Path) -> None:
    """Check that a Hugging Face directory has the weights, bit for bit, and the other files of its source."""
    expected, actual = weights(source), weights(converted)
    assert expected.keys() == actual.keys()
    assert all(expected[n].dtype == actual[n].dtype and torch.equal(expected[n], actual[n]) for n in expected)
    for file in (f for f in source.rglob("*") if f.is_file() and f.suffix != ".safetensors"):
        if file.name == "config.json":
            assert json.loads((converted / file.name).read_text()) == read_hf_config(source)
        elif "index" not in file.name:
            assert (converted / file.relative_to(source)).read_bytes() == file.read_bytes(), file.name


def test_converting_a_model_there_and_back_changes_no_bit(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    megatron, nemo = tmp_path / "megatron", tmp_path / "nemo"
    assert hf_to_megatron.main([str(model), str(megatron)]) == 0
    assert megatron_to_hf.main([str(megatron), str(tmp_path / "one")]) == 0
    assert hf_to_nemo.main([str(model), str(nemo)]) == 0
    assert nemo_to_hf.main([str(nemo), str(tmp_path / "two")]) == 0
    for out in ("one", "two"):
        assert_same(model, tmp_path / out)
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "two")


def test_bfloat16_weights_and_several_shards_are_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = add_other_files(save_model(tmp_path / "model", "qwen2", tied=False))
    save_file({n: t.bfloat16() for n, t in weights(source).items()}, source / "model.safetensors")
    convert.hf_to_megatron(source, tmp_path / "megatron")
    monkeypatch.setattr(convert, "write_safetensors", lambda *a: write_safetensors(*a, shard_bytes=50_000))
    convert.megatron_to_hf(tmp_path / "megatron", tmp_path / "out", source)
    assert_same(source, tmp_path / "out")
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3 and {f.name for f in files} == set(index["weight_map"].values())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in weights(source).values())
    for file in files:
        with safe_open(file, framework="pt") as handle:
            assert {index["weight_map"][name] for name in handle.keys()} == {file.name}  # noqa: SIM118


def test_megatron_cores_own_reader_opens_a_converted_checkpoint(model: Path, tmp_path: Path) -> None:
    convert.hf_to_megatron(model, tmp_path / "megatron")
    parallel.start(model_config(model))
    tensors = dist_checkpointing.load_plain_tensors(str(tmp_path / "megatron"))
    assert tensors["decoder.layers.mlp.linear_fc1.weight"].shape == (4, 256, 64)
    gate = weights(model)["model.layers.2.mlp.gate_proj.weight"]
    assert torch.equal(tensors["decoder.layers.mlp.linear_fc1.weight"][2, :128], gate)


def test_a_nemo_directory_has_all_that_a_megatron_model_loads(model: Path, tmp_path: Path) -> None:
    """NeMo's MegatronCheckpointIO asks for the weights and for the layers' FP8 states, which are empty."""
    nemo = convert.hf_to_nemo(model, tmp_path / "nemo")
    parallel.start(model_config(model))
    policy = Policy(model_config(model), trainable=False, read_weights=False)
    state = policy.model.chunks[0].sharded_state_dict(prefix="module.")
    assert any(name.endswith("._extra_state") for name in state)
    loaded = dist_checkpointing.load(state, str(nemo / "weights"), strict=StrictHandling.RAISE_UNEXPECTED)
    policy.model.chunks[0].load_state_dict({name.removeprefix("module."): value for name, value in loaded.items()})
    expected = weights(model)
    actual = dict(policy.named_weights())
    assert actual.keys() == expected.keys() and all(torch.equal(actual[n], expected[n]) for n in expected)


def test_nemos_context_names_the_class_that_has_the_models_rope(model: Path, tmp_path: Path) -> None:
    """NeMo 2.7.3 has opened such directories, and its logits were those of transformers (docs/cluster.md)."""
    io = json.loads((convert.hf_to_nemo(model, tmp_path / "nemo") / "context/io.json").read_text())
    kind = json.loads((model / "config.json").read_text())["model_type"]
    classes = {"qwen2": "Qwen2Config", "qwen3": "Qwen3Config", "llama": "Llama31Config", "mistral": "MistralConfig7B"}
    (config,) = [o for key, o in io["objects"].items() if key.startswith(classes[kind].lower() + "_")]
    values = {name: value["value"] for name, value in config["items"]}
    assert values["Attr(name='num_layers')"] == 4 and values["Attr(name='hidden_size')"] == 64
    assert ("Attr(name='scale_factor')" in values) == (kind == "llama")
    if kind == "llama":
        assert values["Attr(name='old_context_len')"] == 64 and values["Attr(name='rotary_base')"] == 500000


def test_a_rope_that_nemo_does_not_have_is_refused(tmp_path: Path) -> None:
    source = save_model(tmp_path / "model", "qwen2", tied=True)
    config = json.loads((source / "config.json").read_text())
    config["rope_parameters"] |= {"rope_type": "linear", "factor": 4.0}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="no rope of type 'linear' for Qwen2"):
        convert.hf_to_nemo(source, tmp_path / "nemo")
    assert not (tmp_path / "nemo").exists()


def test_the_policy_loads_a_converted_checkpoint_and_its_own_checkpoints_are_converted(
    model: Path, tmp_path: Path
) -> None:
    """Both have megatron-core's own names and layouts."""
    megatron = convert.hf_to_megatron(model, tmp_path / "megatron")
    config = model_config(megatron / convert.HF_FILES)
    parallel.start(config)
    policy = Policy(config, trainable=False, read_weights=False)
    checkpoint.load(policy, megatron)
    loaded = {name: tensor.clone() for name, tensor in policy.named_weights()}
    expected = weights(model)
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[n], expected[n]) for n in expected)
    trained = Policy(model_config(model))
    with pytest.raises(UserError, match="weights alone"):
        checkpoint.load(trained, megatron)
    written = checkpoint.save(trained, tmp_path / "run/checkpoints", 1, {}, keep=1)
    assert_same(model, convert.megatron_to_hf(written, tmp_path / "back", model))


def test_padded_rows_of_the_vocabulary_are_left_out(tmp_path: Path) -> None:
    source = save_model(tmp_path / "model", "llama", tied=False)
    megatron = convert.hf_to_megatron(source, tmp_path / "megatron")
    reader = TorchDistReader(megatron)
    assert reader.shape("output_layer.weight") == (VOCABULARY, 64)
    expected = load_file(source / "model.safetensors")
    # A checkpoint as megatron writes it at TP 4: the vocabulary is padded by two rows.
    (tmp_path / "padded").mkdir()
    writer = TorchDistWriter(tmp_path / "padded")
    for name in sorted(reader.names):
        tensor = reader.read(name)
        vocabulary = name in ("output_layer.weight", "embedding.word_embeddings.weight")
        writer.add(f"module.{name}", torch.cat([tensor, tensor.new_zeros(2, 64)]) if vocabulary else tensor)
    writer.close()
    back = weights(convert.megatron_to_hf(tmp_path / "padded", tmp_path / "out", source))
    assert all(torch.equal(back[n], expected[n]) for n in expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.3.mlp.up_proj.weight"), r"missing model\.layers\.3\.mlp\.up_proj\.weight \(1\)"),
        (lambda t: t.update(extra=torch.zeros(1)), r"unexpected extra \(1\)"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(7)}), r"model\.norm\.weight has shape \(7,\)"),
        (
            lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(128, 64).half()}),
            "are of different types",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(change, message, tmp_path, capsys):  # type: ignore[no-untyped-def]
    source = save_model(tmp_path / "model", "qwen2", tied=False)
    capsys.readouterr()
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(UserError, match=message):
        convert.hf_to_megatron(source, tmp_path / "out")
    assert hf_to_nemo.main([str(source), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]  # no unfinished output is left


def test_a_checkpoint_that_does_not_fit_or_is_damaged_is_refused(tmp_path: Path) -> None:
    source = save_model(tmp_path / "model", "qwen2", tied=False)
    megatron = convert.hf_to_megatron(source, tmp_path / "megatron")
    deeper = save_model(tmp_path / "deeper", "qwen2", tied=False, num_hidden_layers=5)
    with pytest.raises(UserError, match=r"layer_norm_weight has shape \(4, 64\), config\.json says \(5, 64\)"):
        convert.megatron_to_hf(megatron, tmp_path / "out", deeper)
    tied = save_model(tmp_path / "tied", "qwen2", tied=True)
    with pytest.raises(UserError, match=r"unexpected output_layer\.weight"):
        convert.megatron_to_hf(megatron, tmp_path / "out", tied)
    with pytest.raises(UserError, match="exists already"):
        convert.megatron_to_hf(megatron, source, source)
    with pytest.raises(UserError, match=r"no torch_dist checkpoint \(no \.metadata\)"):
        convert.megatron_to_hf(tmp_path, tmp_path / "out", source)
    with pytest.raises(UserError, match="give a NeMo 2"):
        convert.nemo_to_hf(tmp_path, tmp_path / "out", source)
    data = megatron / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"__0_0\.distcp has \d+ bytes"):
        convert.megatron_to_hf(megatron, tmp_path / "out", source)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_network_that_config_json_chooses_comes_back_from_megatron_and_nemo_refuses_it(
    variant: str, tmp_path: Path
) -> None:
    source = add_other_files(save_family(tmp_path / "model", variant))
    megatron = convert.hf_to_megatron(source, tmp_path / "megatron")
    back, expected = weights(convert.megatron_to_hf(megatron, tmp_path / "back", source)), weights(source)
    assert back.keys() == expected.keys() and all(torch.equal(back[n], expected[n]) for n in expected)
    with pytest.raises(UserError, match=r"NeMo 2\.0"):
        convert.hf_to_nemo(source, tmp_path / "nemo")


class Attack:
    """Unpickling this object creates the file `hacked`."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("hacked"),))  # type: ignore[return-value]


def test_metadata_with_any_other_object_is_not_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(UserError, match="it is not opened"):
        TorchDistReader(tmp_path)
    assert not (tmp_path / "hacked").exists()
