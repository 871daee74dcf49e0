"""Local layers and stand-ins for Transformer Engine's give the same model, and the same names in all files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fused_layers
import pytest
import torch
from megatron.core.dist_checkpointing import ShardedObject
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from tiny_models import model_config, random_rollouts, save_model
from training import train

from nemo_disco import checkpoint
from nemo_disco.generation.engine import SamplingParams
from nemo_disco.generation.megatron.engine import MegatronEngine
from nemo_disco.policy import hugging_face, layers, modules, parallel
from nemo_disco.policy import policy as policy_module
from nemo_disco.policy.policy import Policy
from nemo_disco.runtime.errors import UserError


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("qwen3"), "qwen3", tied=False)


@pytest.fixture
def build(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """build(fused) -> policy of local layers, or of fused ones that stand in for Transformer Engine's."""
    monkeypatch.setattr(layers, "_transformer_engine_layer", fused_layers.fused_layer)

    def make(fused: bool) -> Policy:
        monkeypatch.setattr(policy_module, "uses_transformer_engine", lambda _: fused)
        config = model_config(model_path)
        parallel.start(config)
        return Policy(config)

    return make


def test_megatron_fuses_norm_and_linear_in_transformer_engines_layers() -> None:
    """The stand-ins for these layers are built on this assumption."""
    assert TESpecProvider().fuse_layernorm_and_linear()


def test_both_kinds_of_layers_compute_the_same_from_the_same_files(build: Any) -> None:
    rollouts, results = random_rollouts(), []
    for fused in (False, True):
        policy = build(fused)
        weights = {name: w.clone() for name, w in policy.named_weights()}
        responses = MegatronEngine(policy, [1]).generate([[5, 9, 3]] * 2, [1, 2], SamplingParams(1.0, 10))
        results.append((policy.log_probs(rollouts)[0], weights, [r.tokens.tolist() for r in responses]))
    (log_probs, weights, tokens), (fused_log_probs, fused_weights, fused_tokens) = results
    torch.testing.assert_close(fused_log_probs, log_probs, rtol=0, atol=1e-5)
    assert weights.keys() == fused_weights.keys()
    assert all(torch.equal(weights[name], fused_weights[name]) for name in weights)
    assert tokens == fused_tokens


def test_both_kinds_of_layers_have_the_same_names_in_a_checkpoint(build: Any) -> None:
    keys = []
    for fused in (False, True):
        state = build(fused).model.chunks[0].sharded_state_dict()
        keys.append({t.key for t in state.values() if not isinstance(t, ShardedObject)})
    assert keys[0] == keys[1]
    assert {"decoder.layers.self_attention.linear_qkv.layer_norm_weight", "decoder.final_layernorm.weight"} < keys[0]


@pytest.mark.parametrize("first", [False, True])
def test_a_run_can_be_resumed_with_the_other_kind_of_layers(build: Any, tmp_path: Path, first: bool) -> None:
    policy = build(first)
    train(policy, [1, 2])
    checkpoint.save(policy, tmp_path, 2, {}, keep=1)
    train(policy, [3])
    expected = policy.log_probs(random_rollouts())[0]
    other = build(not first)
    checkpoint.load_latest(other, tmp_path)
    train(other, [3])
    torch.testing.assert_close(other.log_probs(random_rollouts())[0], expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({"transformer_engine": True}, "transformer_engine=true"),
        ({"fp8": "delayed"}, "fp8=delayed"),
        ({"apply_rope_fusion": True}, "apply_rope_fusion=true"),
    ],
)
def test_settings_of_transformer_engine_are_refused_without_it(
    model_path: Path, changes: dict[str, Any], setting: str
) -> None:
    config = model_config(model_path, **changes)
    parallel.start(config)
    with pytest.raises(UserError, match=f"model.{setting} needs Transformer Engine and CUDA"):
        Policy(config)


def test_the_activation_is_one_function_of_the_first_matrix(model_path: Path) -> None:
    """megatron calls it with gate and up side by side; on CUDA it is compiled."""
    config = model_config(model_path)
    parallel.start(config)
    mlp = Policy(config).model.chunks[0].decoder.layers[0].mlp
    x = torch.randn(5, 1, 64)
    gate, up = (x @ mlp.linear_fc1.weight.T).chunk(2, -1)
    expected = (gate * gate.sigmoid() * up) @ mlp.linear_fc2.weight.T
    assert isinstance(mlp.activation_func, modules.GatedActivation)
    torch.testing.assert_close(mlp(x)[0], expected)


def test_weights_are_rounded_to_the_models_type_before_they_are_stored(
    model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A parameter in FP8 quantizes the values copied into it, which must be the same whatever the type of the file."""
    config = model_config(model_path)
    parallel.start(config)
    policy = Policy(config, dtype=torch.bfloat16, trainable=False)
    weights = {name: w.double() for name, w in policy.named_weights()}
    types, copy = [], torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda to, source: types.append(source.dtype) or copy(to, source))
    policy.load(weights.__getitem__)
    assert len(types) > 20 and set(types) == {torch.bfloat16}


def test_weights_in_fp8_are_exported_as_ordinary_numbers(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are in FP8 with model.fp8_param_gather. As a stand-in, every matrix is taken as FP8 at half its value."""
    config = model_config(model_path)
    parallel.start(config)
    policy = Policy(config, trainable=False)
    plain = {name: w.clone() for name, w in policy.named_weights()}
    monkeypatch.setattr(hugging_face, "is_float8tensor", lambda p: p.dim() == 2)
    monkeypatch.setattr(hugging_face, "dequantize_fp8_tensor", lambda p: 2 * p)
    for name, weight in policy.named_weights():
        assert torch.equal(weight, plain[name] * (2 if weight.dim() == 2 else 1))
