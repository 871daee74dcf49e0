"""FP8 with each recipe: the settings that megatron-core and Transformer Engine get, and training, which agrees with
float32 up to FP8's error. The layers are stand-ins in plain torch that round as Transformer Engine's do. The state of
delayed scaling is tested in test_fp8_scales.py."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import fused_layers
import pytest
import torch
from megatron.core import fp8_utils
from megatron.core import utils as megatron_utils
from megatron.core.extensions import transformer_engine as extensions
from packaging.version import Version
from tiny_models import model_config, random_rollouts, save_model
from training import fingerprint, train

from nemo_disco import checkpoint
from nemo_disco.checkpoint import files as checkpoint_files
from nemo_disco.policy import layers, parallel
from nemo_disco.policy import policy as policy_module
from nemo_disco.policy.policy import Policy

RECIPES = ["delayed", "current", "blockwise"]
STATELESS = RECIPES[1:]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model wider than a block of 128."""
    shape = {"hidden_size": 256, "num_hidden_layers": 2, "intermediate_size": 192}
    return save_model(tmp_path_factory.mktemp("qwen2"), "qwen2", tied=False, **shape)


@pytest.fixture
def build(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Policy]:
    """build(fp8, **changes) -> policy with stand-ins for Transformer Engine's layers; `changes` are of ModelConfig."""
    monkeypatch.setattr(layers, "_transformer_engine_layer", fused_layers.fused_layer)
    monkeypatch.setattr(policy_module, "uses_transformer_engine", lambda _: True)

    def make(fp8: str | None, **changes: Any) -> Policy:
        config = model_config(model_path, fp8=fp8, **({"token_budget": 128} | changes))
        parallel.start(config)
        return Policy(config)

    return make


# --- settings ---


@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize(
    ("fp8", "number_format", "recipe"),
    [("delayed", "hybrid", "delayed"), ("current", "hybrid", "tensorwise"), ("blockwise", "e4m3", "blockwise")],
)
def test_all_parts_of_megatron_get_the_recipe(
    build: Callable[..., Policy], fp8: str, number_format: str, recipe: str, gather: bool
) -> None:
    """Layers, communication and optimizer have separate settings."""
    policy = build(fp8, fp8_param_gather=gather)
    config = policy.model.chunks[0].config
    assert (config.fp8, config.fp8_recipe, config.fp8_param) == (number_format, recipe, gather)
    assert (config.fp8_amax_history_len, config.fp8_amax_compute_algo) == (1024, "max")
    assert [ddp.ddp_config.fp8_param_gather for ddp in policy.network] == [gather]
    assert policy.optimizer is not None
    assert [part.config.fp8_recipe for part in policy.optimizer._parts] == [recipe]


def test_without_fp8_megatron_gets_no_recipe(build: Callable[..., Policy]) -> None:
    policy = build(None)
    config = policy.model.chunks[0].config
    assert (config.fp8, config.fp8_param, policy.network[0].ddp_config.fp8_param_gather) == (None, False, False)
    assert policy.optimizer is not None
    assert [part.config.fp8_recipe for part in policy.optimizer._parts] == [None]


def make_recipe_class(name: str, *parameters: str) -> type:
    """A stand-in for a recipe class of Transformer Engine 2.11, which takes the same parameters."""

    def init(self: Any, **arguments: Any) -> None:
        assert arguments.keys() <= set(parameters), f"{name} has {parameters}, not {sorted(arguments)}"
        self.__dict__ |= arguments

    return type(name, (), {"__init__": init})


@dataclass
class TransformerEngineCalls:
    """The arguments with which megatron entered Transformer Engine's two contexts, and the module that enters them."""

    autocast: dict[str, Any]
    model_init: dict[str, Any]
    fp8_utils: Any


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> TransformerEngineCalls:
    """Records of a stand-in for Transformer Engine, and megatron's own fp8_utils, imported again with that stand-in."""
    calls = TransformerEngineCalls({}, {}, None)

    @contextmanager
    def fp8_autocast(**arguments: Any) -> Any:
        calls.autocast = arguments
        yield

    @contextmanager
    def fp8_model_init(enabled: bool, recipe: Any, preserve_high_precision_init_val: bool) -> Any:
        calls.model_init = {"enabled": enabled, "recipe": recipe, "preserves": preserve_high_precision_init_val}
        yield

    recipes = SimpleNamespace(
        Format=SimpleNamespace(E4M3="e4m3", HYBRID="e4m3 and e5m2"),
        Float8CurrentScaling=make_recipe_class("Float8CurrentScaling", "fp8_format", "fp8_dpa", "fp8_mha"),
        Float8BlockScaling=make_recipe_class("Float8BlockScaling", "fp8_format", "fp8_dpa", "fp8_mha"),
    )
    names: dict[str, dict[str, Any]] = {
        "transformer_engine": {"__version__": "2.11.0", "common": SimpleNamespace(recipe=recipes)},
        "transformer_engine.pytorch": {"fp8_autocast": fp8_autocast, "fp8_model_init": fp8_model_init},
        "transformer_engine.pytorch.fp8": {"FP8GlobalStateManager": object},
        "transformer_engine.pytorch.tensor": {"QuantizedTensor": type("QuantizedTensor", (), {})},
        "transformer_engine.pytorch.tensor.utils": {"post_all_gather_processing": None},
        "transformer_engine.pytorch.tensor.mxfp8_tensor": {"MXFP8Tensor": type("MXFP8Tensor", (), {})},
    }
    for name, content in names.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    vars(sys.modules["transformer_engine"])["pytorch"] = sys.modules["transformer_engine.pytorch"]
    monkeypatch.setattr(megatron_utils, "_te_version", Version("2.11.0"))
    delayed = make_recipe_class("TEDelayedScaling", "config", "fp8_format", "override_linear_precision")
    monkeypatch.setattr(extensions, "TEDelayedScaling", delayed)
    spec = importlib.util.spec_from_file_location("fp8_utils_beside_an_engine", fp8_utils.__file__)
    assert spec is not None and spec.loader is not None
    calls.fp8_utils = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(calls.fp8_utils)
    return calls


@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize(
    ("fp8", "expected", "number_format"),
    [
        ("delayed", "TEDelayedScaling", "e4m3 and e5m2"),
        ("current", "Float8CurrentScaling", "e4m3 and e5m2"),
        ("blockwise", "Float8BlockScaling", "e4m3"),
    ],
)
def test_megatron_builds_transformer_engines_recipe_from_the_settings(
    build: Callable[..., Policy],
    calls: TransformerEngineCalls,
    fp8: str,
    expected: str,
    number_format: str,
    gather: bool,
) -> None:
    config = build(fp8, fp8_param_gather=gather).model.chunks[0].config
    with calls.fp8_utils.get_fp8_context(config, 0), calls.fp8_utils.get_fp8_context(config, 0, is_init=True):
        pass
    recipe = calls.autocast["fp8_recipe"]
    assert (type(recipe).__name__, recipe.fp8_format, calls.autocast["enabled"]) == (expected, number_format, True)
    assert not getattr(recipe, "fp8_dpa", False), "attention would not stay in bf16"
    if gather:  # the optimizer starts from the weights before rounding
        assert type(calls.model_init["recipe"]).__name__ == expected and calls.model_init["preserves"]
    else:
        assert not calls.model_init


# --- micro-batches ---


@pytest.mark.parametrize(("fp8", "multiple"), [("delayed", 16), ("current", 16), ("blockwise", 128)])
def test_micro_batches_are_padded_to_the_multiple_that_the_recipe_needs(
    build: Callable[..., Policy], monkeypatch: pytest.MonkeyPatch, fp8: str, multiple: int
) -> None:
    sizes, make = [], policy_module.build_micro_batch

    def build_and_measure(*args: Any, **kwargs: Any) -> Any:
        batch = make(*args, **kwargs)
        sizes.append(batch.input_ids.shape[1])
        return batch

    monkeypatch.setattr(policy_module, "build_micro_batch", build_and_measure)
    train(build(fp8), [1])
    assert len(sizes) > 1 and all(size % multiple == 0 for size in sizes)
    sizes.clear()
    train(build(None), [1])
    assert any(size % 16 for size in sizes), "micro-batches are padded without FP8"


# --- training ---


@pytest.mark.parametrize("scale", [1.0, 1e-12])
def test_the_stand_ins_round_as_fp8_does(scale: float) -> None:
    """e4m3 has 3 bits after the first. With block scaling, a large number costs precision only in its own block."""
    x = torch.randn(130, 300, generator=torch.Generator().manual_seed(0)) * scale
    large = x.clone()
    large[0, 0] = 1e7 * scale
    for rounding, rows in ((fused_layers.ROUNDINGS["blockwise"][0], 1), (fused_layers.ROUNDINGS["blockwise"][1], 128)):
        assert float((rounding(x) - x).norm() / x.norm()) < 0.04
        difference = rounding(large) != rounding(x)
        assert difference[:rows, :128].float().mean() > 0.9
        difference[:rows, :128] = False
        assert not difference.any()
    assert float((fused_layers.ROUNDINGS["tensorwise"][0](x) - x).norm() / x.norm()) < 0.04
    assert not fused_layers.ROUNDINGS["tensorwise"][0](large)[1:].any()


def compute_gradient(policy: Policy) -> torch.Tensor:
    """The whole gradient of a very small loss, as one vector."""
    policy.accumulate(random_rollouts(), lambda _, values: 1e-9 * values.log_probs)
    return torch.cat([g.flatten().clone() for _, g in policy.named_gradients()])


@pytest.mark.parametrize("fp8", STATELESS)
def test_the_gradient_is_that_of_float32_up_to_the_error_of_fp8(build: Callable[..., Policy], fp8: str) -> None:
    """This holds from the first pass on, however small the gradient is, since no pass depends on earlier ones."""
    plain = build(None)
    expected, expected_log_probs = compute_gradient(plain), plain.log_probs(random_rollouts())[0]
    policy = build(fp8)
    assert not policy.unscaled
    log_probs, again = (policy.log_probs(random_rollouts())[0] for _ in "ab")
    assert torch.equal(log_probs, again)
    actual, again = compute_gradient(policy), compute_gradient(policy)
    assert torch.equal(actual, again)
    # The bounds of benchmarks/gpu/correctness.py.
    for value, reference, bound in ((log_probs, expected_log_probs, 0.1), (actual, expected, 0.3)):
        error = float((value - reference).norm() / reference.norm())
        assert 1e-3 < error < bound, error


@pytest.mark.parametrize("fp8", STATELESS)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    build: Callable[..., Policy], tmp_path: Path, fp8: str
) -> None:
    policy = build(fp8)
    train(policy, [1, 2])
    path = checkpoint.save(policy, tmp_path, 2, {}, keep=1)
    assert checkpoint_files.read_record(path)["fp8_scales"] is False, "the recipe has no scales to save"
    resumed = build(fp8)
    checkpoint.load_latest(resumed, tmp_path)
    assert fingerprint(resumed) == fingerprint(policy)
    for each in (policy, resumed):
        train(each, [3])
    assert fingerprint(resumed) == fingerprint(policy)


@pytest.mark.parametrize(("before", "after"), [("delayed", "blockwise"), ("current", "delayed"), (None, "current")])
def test_a_checkpoint_of_one_recipe_can_be_resumed_with_another(
    build: Callable[..., Policy], tmp_path: Path, before: str | None, after: str
) -> None:
    policy = build(before)
    train(policy, [1, 2])
    checkpoint.save(policy, tmp_path, 2, {}, keep=1)
    expected = policy.log_probs(random_rollouts())[0]
    other = build(after)
    checkpoint.load_latest(other, tmp_path)
    assert bool(other.unscaled) == (after == "delayed"), "only delayed scaling must begin without a history"
    actual = other.log_probs(random_rollouts())[0]
    assert float((actual - expected).norm() / expected.norm()) < 0.1
    train(other, [3])
