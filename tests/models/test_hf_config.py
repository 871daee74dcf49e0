"""The config.json of published models is read as transformers reads it; networks that are not built are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from real_configs import REAL_CONFIGS

from nemo_disco.commands.plan import find_workload
from nemo_disco.config.compose import compose
from nemo_disco.estimate.plan import print_plan
from nemo_disco.models.architecture import ARCHITECTURES
from nemo_disco.models.hf_config import BUILT_VALUES, HARMLESS, READ_FIELDS, read_hf_config
from nemo_disco.models.shape import read_shape
from nemo_disco.runtime.errors import UserError

LLAMA3 = REAL_CONFIGS["Llama-3.1-8B-Instruct"]["rope_scaling"]
QWEN2, LLAMA, MISTRAL = (REAL_CONFIGS[n] for n in ("Qwen2.5-0.5B", "Llama-3.1-8B-Instruct", "Mistral-7B-Instruct-v0.3"))
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 32,
    "long_factor": [2.0] * 32,
    "original_max_position_embeddings": 8192,
}
QWEN3, SMOLLM3 = REAL_CONFIGS["Qwen3-0.6B"], REAL_CONFIGS["SmolLM3-3B"]
PHI4 = REAL_CONFIGS["Phi-4-mini-instruct"]
SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
)  # fmt: skip


@pytest.fixture
def write_config(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    """write_config(config) -> directory with this config.json."""

    def write(config: dict[str, Any]) -> Path:
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return write


def assert_transformers_reads(directory: Path, config: dict[str, Any]) -> None:
    """Assert that transformers reads the network of `config` from `directory`."""
    from transformers import AutoConfig

    network = AutoConfig.from_pretrained(directory)
    assert {name: getattr(network, name) for name in SIZES} == {name: config[name] for name in SIZES}
    # `type` is the older name of rope_type, and Phi-3's config names a rotation of whole heads too.
    whole = {"type": network.rope_parameters.get("type"), "partial_rotary_factor": 1}
    rope = {name: value for name, value in network.rope_parameters.items() if whole.get(name) != value}
    assert rope == config["rope_parameters"]
    head_dim = getattr(network, "head_dim", None)
    assert head_dim in (None, config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
    if config.get("dtype"):
        assert str(network.dtype) == f"torch.{config['dtype']}"


@pytest.mark.parametrize("name", REAL_CONFIGS)
def test_published_models_are_read_as_transformers_reads_them(name: str, write_config: Callable[..., Path]) -> None:
    config = read_hf_config(write_config(REAL_CONFIGS[name]))
    assert_transformers_reads(write_config(REAL_CONFIGS[name]), config)
    assert config.items() >= {k: v for k, v in REAL_CONFIGS[name].items() if k != "rope_scaling"}.items()
    assert config["torch_dtype"] == config["dtype"]
    rope = config["rope_scaling"] or {"rope_type": "default"}
    beside = {k: config[k] for k in ("rope_theta", "partial_rotary_factor") if k in config}
    assert rope | beside == config["rope_parameters"]
    assert_transformers_reads(write_config(config), config)  # both spellings in one file
    assert read_hf_config(write_config(config)) == config


@pytest.mark.parametrize("kind", sorted(ARCHITECTURES))
def test_what_transformers_saves_is_accepted(kind: str, write_config: Callable[..., Path]) -> None:
    """transformers saves every field, also those with default values."""
    from transformers import AutoConfig

    saved = AutoConfig.for_model(kind, **({"sliding_window": None} if kind == "mistral" else {}))
    assert_transformers_reads(write_config(saved.to_dict()), read_hf_config(write_config(saved.to_dict())))


@pytest.mark.parametrize("kind", sorted(ARCHITECTURES))
def test_fields_that_are_left_out_have_transformers_values(kind: str, write_config: Callable[..., Path]) -> None:
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings")
    config: dict[str, Any] = dict.fromkeys(needed, 64) | {"model_type": kind, "num_attention_heads": 32}
    if kind == "mistral":
        config["sliding_window"] = None
    assert_transformers_reads(write_config(config), read_hf_config(write_config(config)))
    for name in needed:
        with pytest.raises(UserError, match=f"config.json: {name} is missing"):
            read_hf_config(write_config({k: v for k, v in config.items() if k != name}))


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
KNOWN_FIELDS = READ_FIELDS | set(HARMLESS) | set(BUILT_VALUES) | {"attention_bias"}


@given(
    name=st.text(max_size=30).filter(lambda n: n not in KNOWN_FIELDS),
    value=JSON_VALUES,
    real=st.sampled_from(list(REAL_CONFIGS)),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_field_that_is_not_known_is_refused_by_name(
    name: str, value: Any, real: str, write_config: Callable[..., Path]
) -> None:
    with pytest.raises(UserError) as error:
        read_hf_config(write_config(REAL_CONFIGS[real] | {name: value}))
    assert "\n" not in str(error.value)
    assert "not a field that is known" in str(error.value)
    assert f"config.json: {json.dumps(name)[1:-1]}="[:50] in str(error.value)


@given(name=st.sampled_from(sorted(KNOWN_FIELDS)), value=JSON_VALUES)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_value_of_a_known_field_is_accepted_or_refused_in_one_line(
    name: str, value: Any, write_config: Callable[..., Path]
) -> None:
    refusal = None
    try:
        config = read_hf_config(write_config(LLAMA | {name: value}))
    except UserError as error:
        refusal = str(error)
    if refusal is None:
        assert name in HARMLESS or config["hidden_size"] >= 1
    else:
        assert "\n" not in refusal and (name in refusal or name == "rope_theta")


@pytest.mark.parametrize(
    ("base", "changes", "complaint"),
    [
        (LLAMA, {"attention_bias": "yes"}, 'attention_bias="yes" is not built, only true or false'),
        (MISTRAL, {"attention_bias": True}, "attention_bias=true is not built"),
        (QWEN2, {"attention_bias": False}, "attention_bias=false is not built"),
        (QWEN2, {"mlp_bias": True}, "mlp_bias=true is not built"),
        (QWEN2, {"model_type": "qwen3_moee"}, '"qwen3_moee" is not built; .*; the nearest that is: qwen3_moe$'),
        (QWEN2, {"no_rope_layers": [1] * 24}, "no_rope_layers=.* is not built: this model_type has rope in every"),
        (SMOLLM3, {"no_rope_layers": [1] * 35}, "no_rope_layers=.* is not 0 or 1 for each of num_hidden_layers=36"),
        (SMOLLM3, {"no_rope_layers": None, "no_rope_layer_interval": 0}, "no_rope_layer_interval=0 is not"),
        (LLAMA, {"hidden_act": "relu2"}, 'hidden_act="relu2" is not built, only "silu"'),
        (QWEN2, {"attention_dropout": 0.1}, "attention_dropout=0.1 is not built"),
        (QWEN2, {"use_mrope": True}, "use_mrope=true is not built"),
        (LLAMA, {"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantization_config=.*unquantized model"),
        (LLAMA, {"quantization_config": {"quant_method": "fp8"}}, "quantization_config=.*unquantized model"),
        (LLAMA, {"quantization": {"group_size": 64, "bits": 4}}, "quantization=.*unquantized model"),
        (LLAMA, {"sliding_window": 4096}, "sliding_window=4096 is not built: this model_type has none"),
        (MISTRAL, {"sliding_window": 0}, "sliding_window=0 is neither null nor a whole number"),
        (MISTRAL, {"sliding_window": 4096, "use_sliding_window": False}, "set sliding_window to null"),
        (MISTRAL, {"layer_types": ["sliding_attention"] * 32}, "layer_types=.* contradicts sliding_window=null"),
        (QWEN2, {"layer_types": ["sliding_attention"] * 24}, "layer_types=.* contradicts sliding_window=32768"),
        (QWEN2, {"layer_types": ["chunked_attention"] * 24}, "layer_types=.* is not 'full_attention' or"),
        (QWEN2, {"max_window_layers": -1}, "max_window_layers=-1 is not a whole number of at least 0"),
        (QWEN2, {"layer_types": ["full_attention"] * 23}, "num_hidden_layers=24"),
        (QWEN2, {"architectures": ["Qwen2ForSequenceClassification"]}, "architectures=.* is not built"),
        (QWEN2, {"auto_map": {"AutoModelForCausalLM": "modeling_x.Mine"}}, "auto_map=.* code of the model's own"),
        (QWEN2, {"torch_dtype": "float8_e4m3fn"}, 'torch_dtype="float8_e4m3fn" is not a type'),
        (QWEN2, {"dtype": "float32"}, 'dtype="float32" and torch_dtype="bfloat16" contradict'),
        (QWEN2, {"num_key_value_heads": 3}, "num_key_value_heads=3 does not divide num_attention_heads=14"),
        (QWEN2, {"num_attention_heads": 0}, "num_attention_heads=0 is not a whole number of at least 1"),
        (QWEN2, {"hidden_size": "896"}, 'hidden_size="896" is not a whole number'),
        (QWEN2, {"vocab_size": 2**31}, "vocab_size=2147483648 is not a whole number of at least 1 and at most"),
        (LLAMA, {"num_hidden_layers": 2**70}, "num_hidden_layers=1180591620717411303424 is not a whole number"),
        (QWEN2, {"num_hidden_layers": 10**6, "layer_types": None}, "num_hidden_layers=1000000 .* at most 10,000"),
        (QWEN2, {"head_dim": None}, "head_dim=null is not a whole number"),
        (QWEN2, {"rms_norm_eps": float("nan")}, "rms_norm_eps=NaN is not a number above 0"),
        (QWEN2, {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not built"),
        (QWEN2, {"rope_scaling": {"rope_type": "ntk", "factor": 4.0}}, "rope_type 'ntk' is not built"),
        (QWEN2, {"rope_scaling": YARN | {"attn_factor": 0.878}}, "attn_factor=0.878 .* attention_factor=0.9997"),
        (QWEN2, {"rope_scaling": YARN | {"truncate": 1}}, "truncate=1 is neither true nor false"),
        (QWEN2, {"rope_scaling": LONG | {"long_factor": [2.0] * 8}}, "long_factor has 8 numbers, not one for each of"),
        (QWEN2, {"rope_scaling": LONG | {"long_factor": 2.0}}, "long_factor=2.0 is not a list of numbers"),
        (QWEN2, {"rope_scaling": LONG | {"short_factor": [1.0, 0]}}, r"short_factor\[1\]=0 is not a number above 0"),
        (QWEN2, {"rope_scaling": LONG | {"factor": 4.0}}, "factor=4.0 is not built for rope_type 'longrope'"),
        (QWEN2, {"rope_scaling": {"rope_type": "linear", "factor": 4.0, "x": 1}}, "rope_scaling: x=1 is not built"),
        (QWEN2, {"rope_scaling": {"rope_type": "linear"}}, "rope_scaling: factor=None is not a number"),
        (QWEN2, {"rope_theta": -1}, "rope_theta=-1 is not a number above 0"),
        (QWEN2, {"rope_theta": None}, "rope_theta=null is not a number above 0"),
        (QWEN2, {"rope_scaling": {"rope_type": None, "type": "linear", "factor": 2.0}}, "rope_type None is not a text"),
        (QWEN2, {"rope_scaling": YARN | {"truncate": None}}, "truncate=None is neither true nor false"),
        (QWEN2, {"rope_scaling": YARN, "rope_theta": 1}, "rope_theta=1 .* must be above 1"),
        (QWEN2, {"rope_scaling": YARN | {"factor": 10**400}}, "factor=10+ is not a number above 0"),
        (QWEN2, {"model_type": "gpt_oss"}, 'model_type "gpt_oss" is not built: its attention has sinks'),
        (QWEN2, {"model_type": ["qwen2"]}, 'model_type .* is not built; known: llama'),
        (QWEN3, {"rope_scaling": YARN | {"attn_factor": 0.8782488562869419}}, "write attention_factor=1 instead"),
        (PHI4, {"partial_rotary_factor": 1.5}, "partial_rotary_factor=1.5 is more than 1"),
        (PHI4, {"partial_rotary_factor": 0.25}, "short_factor has 48 numbers, not one for each of 16 pairs of a head"),
        (PHI4, {"rope_parameters": {"partial_rotary_factor": 1}, "rope_scaling": None}, "0.75 and 1 contradict"),
        (PHI4, {"rope_scaling": LONG}, "=8192 there and 4096 beside it contradict"),
        (PHI4, {"resid_pdrop": 0.1}, "resid_pdrop=0.1 is not built"),
        (PHI4, {"auto_map": {"AutoModel": "modeling_phi3.Other"}}, "auto_map=.* code of the model's own"),
        (LLAMA, {"original_max_position_embeddings": 4096}, "original_max_position_embeddings=4096: not a field"),
        (QWEN3, {"head_dim": 5}, "a head has 5 numbers, and rope rotates pairs of them"),
        (SMOLLM3, {"head_dim": None}, "head_dim=null is not a whole number"),
        (LLAMA, {"rope_parameters": LLAMA3 | {"factor": 4.0}}, "contradict"),
        (LLAMA, {"rope_parameters": LLAMA3 | {"rope_theta": 10000.0}}, "contradict"),
        (LLAMA, {"rope_scaling": LLAMA3 | {"type": "linear"}}, "contradict"),
    ],
)  # fmt: skip
def test_a_network_that_is_not_built_is_refused_by_field_and_value(
    base: dict[str, Any], changes: dict[str, Any], complaint: str, write_config: Callable[..., Path]
) -> None:
    directory = write_config(base | changes)
    with pytest.raises(UserError, match=complaint) as error:
        read_hf_config(directory)
    assert str(error.value).startswith(f"{directory}/config.json: ")


@pytest.mark.parametrize(
    ("base", "changes"),
    [
        (QWEN2, {"use_sliding_window": True, "sliding_window": None}),
        (QWEN2, {"use_sliding_window": True, "max_window_layers": 20}),
        (SMOLLM3, {"no_rope_layers": None, "use_sliding_window": True, "sliding_window": 512}),
        (MISTRAL, {"sliding_window": 4096}),
        (LLAMA, {"mlp_bias": True, "attention_bias": True, "hidden_act": "gelu_new"}),
        (QWEN2, {"rope_scaling": YARN | {"attention_factor": 1.5, "truncate": False}}),
        (QWEN2, {"rope_scaling": LONG}),
        (QWEN2, {"use_sliding_window": True, "max_window_layers": 24}),
        (QWEN2, {"use_sliding_window": True, "layer_types": ["full_attention"] * 24}),
        (QWEN2, {"rope_scaling": {"type": "linear", "factor": 2.0}}),
        (QWEN2, {"rope_scaling": {"type": "default"}, "rope_parameters": {"rope_type": "default"}}),
        (LLAMA, {"rope_parameters": LLAMA3 | {"rope_theta": 500000.0}, "rope_scaling": None, "rope_theta": None}),
        (LLAMA, {"num_key_value_heads": None, "head_dim": None, "quantization_config": None}),
    ],
)  # fmt: skip
def test_values_that_are_built_are_read_as_transformers_reads_them(
    base: dict[str, Any], changes: dict[str, Any], write_config: Callable[..., Path]
) -> None:
    config = {k: v for k, v in (base | changes).items() if k != "rope_theta" or v is not None}
    assert_transformers_reads(write_config(config), read_hf_config(write_config(config)))


@pytest.mark.parametrize("text", ["{", "[]", "\xff", "[" * 100_000, '"text"'])
def test_a_file_that_is_no_object_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match="the model directory is damaged"):
        read_hf_config(tmp_path)


def test_the_plan_refuses_a_field_that_is_not_known_too(write_config: Callable[..., Path]) -> None:
    config = compose("quickstart", [f"model.path={write_config(QWEN2 | {'logit_scale': 2.0})}"])
    with pytest.raises(UserError, match=r"logit_scale=2\.0: not a field that is known"):
        print_plan(config, 1, find_workload(config))


@pytest.mark.parametrize("name", ["Qwen2.5-0.5B", "Qwen3-0.6B", "SmolLM3-3B", "Mistral-7B-Instruct-v0.3"])
@pytest.mark.parametrize("window", ["left out", None, 100])
def test_windows_and_layers_without_rope_are_transformers(
    name: str, window: int | str | None, write_config: Callable[..., Path]
) -> None:
    from transformers import AutoConfig

    config = REAL_CONFIGS[name] | {"use_sliding_window": True, "max_window_layers": 4, "sliding_window": window}
    config.pop("layer_types", None)
    if window == "left out":
        config.pop("sliding_window")
    expected, shape = AutoConfig.from_pretrained(write_config(config)), read_shape(write_config(config))
    layers, all_full = expected.num_hidden_layers, ["full_attention"] * expected.num_hidden_layers
    kinds = getattr(expected, "layer_types", None) or (
        ["sliding_attention"] * layers if expected.sliding_window else all_full
    )
    assert (shape.windowed or (False,) * layers) == tuple(kind == "sliding_attention" for kind in kinds)
    assert shape.window == (expected.sliding_window if kinds != all_full else None)
    rotated = getattr(expected, "no_rope_layers", [1] * layers)
    assert (shape.ropeless or (False,) * layers) == tuple(not on for on in rotated)
