"""The policy has the logits, log-probs and gradient of the same model in transformers, and exports the same weights."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import (
    LLAMA3_ROPE,
    limit_vocabulary,
    load_transformers_model,
    model_config,
    random_rollouts,
    save_model,
    transformers_log_probs,
)
from transformers import AutoModelForCausalLM

from nemo_disco.policy import parallel
from nemo_disco.policy.attention import PackedSequences
from nemo_disco.policy.policy import Policy
from nemo_disco.runtime.errors import UserError

TEMPERATURE = 0.6


@pytest.fixture(
    scope="module",
    params=[
        "qwen2-tied",
        "qwen2-untied",
        "qwen3-tied",
        "llama-tied",
        "llama-untied",
        "mistral-untied",
        "smollm3-tied",
        "phi3-tied",
        "olmo2-untied",
    ],
)
def model_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    architecture, tying = request.param.split("-")
    return save_model(tmp_path_factory.mktemp(request.param), architecture, tied=tying == "tied")


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("qwen2"), "qwen2", tied=True)


def build(
    path: Path,
    dtype: torch.dtype = torch.float32,
    vocabulary: int | None = None,
    longest: int = 0,
    **changes: object,
) -> Policy:
    config = model_config(path, **changes)
    parallel.start(config)
    return Policy(config, dtype=dtype, temperature=TEMPERATURE, vocabulary=vocabulary, longest=longest)


def test_logits_equal_transformers(model_path: Path) -> None:
    policy = build(model_path, longest=200)
    ids = torch.randint(0, 130, (1, 200), generator=torch.Generator().manual_seed(1))  # beyond llama3's original 64
    with torch.no_grad():
        logits = policy.model.chunks[0](
            ids, torch.arange(200)[None], None, packed_seq_params=PackedSequences.from_lengths([200])
        )
        expected = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)(ids).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_log_probs_and_entropies_equal_transformers(model_path: Path, dtype: torch.dtype, tolerance: float) -> None:
    rollouts = random_rollouts()
    log_probs, entropies = build(model_path, dtype).log_probs(rollouts, entropies=True)
    with torch.no_grad():
        reference = transformers_log_probs(load_transformers_model(model_path), rollouts, TEMPERATURE)
    assert log_probs.dtype == dtype
    torch.testing.assert_close(log_probs.double(), reference, rtol=0, atol=tolerance)
    assert entropies is not None
    assert float(entropies.min()) > 0


# The last vocabulary is smaller than the number of rows of the embedding.
@pytest.mark.parametrize(("budget", "vocabulary"), [(64, 130), (200, 130), (100_000, 130), (200, 100)])
def test_gradient_does_not_depend_on_the_token_budget(model_path: Path, budget: int, vocabulary: int) -> None:
    rollouts = limit_vocabulary(random_rollouts(), vocabulary)
    weights = torch.randn(int(rollouts.response_lengths.sum()), generator=torch.Generator().manual_seed(3)).double()
    policy = build(model_path, torch.float64, vocabulary, token_budget=budget)
    policy.accumulate(rollouts, lambda index, values: weights[index] * values.log_probs)
    reference = load_transformers_model(model_path)
    expected_log_probs = transformers_log_probs(reference, rollouts, TEMPERATURE, vocabulary)
    torch.testing.assert_close(policy.log_probs(rollouts)[0], expected_log_probs, rtol=0, atol=1e-12)
    (weights * expected_log_probs).sum().backward()
    gradients = dict(policy.named_gradients())
    expected = {name: p.grad for name, p in reference.named_parameters()}
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() <= 1e-12 * gradient.norm(), name


def test_accumulate_replaces_the_previous_gradient(qwen2: Path) -> None:
    rollouts, policy = random_rollouts(), build(qwen2, torch.float64)
    policy.accumulate(rollouts, lambda _, values: values.log_probs)
    once = {name: g.clone() for name, g in policy.named_gradients()}
    policy.accumulate(rollouts, lambda _, values: values.log_probs)
    assert all(torch.equal(once[name], g) for name, g in policy.named_gradients())


@pytest.mark.parametrize("granularity", ["selective", "full"])
def test_recomputation_changes_nothing(qwen2: Path, granularity: str) -> None:
    rollouts = random_rollouts()
    gradients = []
    for setting in (None, granularity):
        policy = build(qwen2, torch.float64, activations_checkpoint_granularity=setting)
        policy.accumulate(rollouts, lambda _, values: values.log_probs)
        gradients.append(dict(policy.named_gradients()))
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-12, atol=1e-14)


def test_rollouts_of_empty_responses_have_no_log_probs_and_no_gradient(qwen2: Path) -> None:
    rollouts, policy = random_rollouts(questions=1, longest=1), build(qwen2)
    log_probs, _ = policy.log_probs(rollouts)
    assert len(log_probs) == 0
    policy.accumulate(rollouts, lambda _, values: values.log_probs)
    assert all(float(g.abs().max()) == 0.0 for _, g in policy.named_gradients())


def test_exported_weights_equal_the_loaded_ones_bit_for_bit(model_path: Path, tmp_path: Path) -> None:
    build(model_path).export(tmp_path / "export")
    before, after = load_file(model_path / "model.safetensors"), load_file(tmp_path / "export" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    kinds = {json.loads((path / "config.json").read_text())["model_type"] for path in (model_path, tmp_path / "export")}
    assert len(kinds) == 1


def test_a_bfloat16_directory_is_exported_as_bfloat16(qwen2: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(qwen2, dtype=torch.bfloat16).save_pretrained(tmp_path / "bf16")
    build(tmp_path / "bf16").export(tmp_path / "export")
    before, after = (load_file(tmp_path / d / "model.safetensors") for d in ("bf16", "export"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_step_changes_the_weights_unless_the_gradient_is_not_finite(qwen2: Path) -> None:
    rollouts, policy = random_rollouts(), build(qwen2)
    weights = {name: w.clone() for name, w in policy.named_weights()}
    policy.accumulate(rollouts, lambda _, values: values.log_probs * float("inf"))
    result = policy.step()
    assert not result.applied
    assert all(torch.equal(weights[name], w) for name, w in policy.named_weights())
    policy.accumulate(rollouts, lambda _, values: -values.log_probs)
    assert policy.step().applied
    assert not any(torch.equal(weights[name], w) for name, w in policy.named_weights())


def test_bfloat16_gradient_points_where_float32_does(qwen2: Path) -> None:
    rollouts, gradients = random_rollouts(), []
    for dtype in (torch.float32, torch.bfloat16):
        policy = build(qwen2, dtype)
        policy.accumulate(rollouts, lambda _, values: values.log_probs)
        gradients.append(torch.cat([g.float().flatten() for _, g in policy.named_gradients()]))
    assert torch.nn.functional.cosine_similarity(gradients[0], gradients[1], dim=0) > 0.999


def copy_and_damage(directory: Path, source: Path, edit: str) -> Path:
    """Copy a model into `directory` and damage the copy. Returns its directory."""
    for file in source.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    config = json.loads((directory / "config.json").read_text())
    if edit == "no weights":
        (directory / "model.safetensors").unlink()
    elif edit == "truncated":
        with (directory / "model.safetensors").open("r+b") as file:
            file.truncate(5000)
    elif edit == "not JSON":
        (directory / "config.json").write_text("{")
    elif edit == "architecture":
        (directory / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    elif edit == "layers":
        kinds = {"layer_types": ["full_attention"] * 5}
        (directory / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5} | kinds))
    elif edit == "contradiction":
        (directory / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    elif edit == "width":
        (directory / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    elif edit == "rope":
        (directory / "config.json").write_text(
            json.dumps(config | {"rope_parameters": LLAMA3_ROPE | {"rope_type": "yarn"}})
        )
    return directory


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ("no weights", "no *.safetensors file of the model"),
        ("truncated", "damaged safetensors file"),
        ("not JSON", "not valid JSON"),
        (
            "architecture",
            '"gpt2" is not built; known: llama, mistral, mixtral, olmo2, phi3, qwen2, qwen3, qwen3_moe, smollm3',
        ),
        ("layers", "missing model.layers.4."),
        ("contradiction", "or 'sliding_attention' for each of num_hidden_layers=5"),
        ("width", "has shape (128, 64), config.json says (96, 64)"),
        ("rope", "high_freq_factor=4.0 is not built for rope_type 'yarn'"),
    ],
)
def test_a_broken_model_directory_is_refused(qwen2: Path, tmp_path: Path, edit: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as error:
        build(copy_and_damage(tmp_path, qwen2, edit))
    assert "\n" not in str(error.value)


def test_a_weight_that_is_not_finite_is_detected_even_if_no_log_prob_depends_on_it(qwen2: Path) -> None:
    """The weight is of a token that is in no response; it may be the only sign that an update overflowed."""
    policy = build(qwen2)
    assert policy.has_finite_weights()
    with torch.no_grad():
        policy.model.chunks[0].embedding.word_embeddings.weight[-1, 3] = torch.inf
    assert not policy.has_finite_weights()
