"""The plan: published parameter counts, and arithmetic that can be done by hand."""

import io

import pytest
from rich.console import Console

from nemo_disco.config.compose import compose
from nemo_disco.config.memory import estimate
from nemo_disco.config.plan import find_shape, print_plan, vocabulary
from nemo_disco.config.shape import KNOWN, read_shape


def printed(config, world_size):
    console = Console(file=io.StringIO(), width=120)
    print_plan(config, world_size, console)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("name", "published"),  # safetensors' own counts on the models' pages
    [
        ("DeepSeek-R1-Distill-Qwen-1.5B", 1_777_088_000),
        ("DeepSeek-R1-Distill-Qwen-7B", 7_615_616_512),
        ("DeepSeek-R1-Distill-Llama-8B", 8_030_261_248),
    ],
)
def test_the_papers_models_have_their_published_sizes(name, published):
    assert KNOWN[name].parameters == published


def test_a_shape_counts_what_transformers_builds(model_directory):
    from transformers import AutoConfig, AutoModelForCausalLM

    for changes in (
        {},
        {"tie_word_embeddings": False, "head_dim": 32},
        {"model_type": "llama", "attention_bias": True},
    ):
        directory = model_directory(**changes)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
        biases = sum(p.numel() for n, p in model.named_parameters() if n.endswith("o_proj.bias"))
        assert read_shape(directory).parameters + biases == sum(p.numel() for p in model.parameters())


def test_the_batch_vocabulary_of_the_papers():
    terms = dict(vocabulary(compose("recipe/disco_logl_1.5b"), world_size=8))
    assert terms["responses a step"] == "1,024 = 128 questions x 8 responses"
    assert terms["mini-batches a step"] == "4 of 32 questions, 256 responses each"
    assert terms["optimizer steps in the run"] == "5,600"
    assert terms["tokens a response"] == "<= 9,216 = 1,024 prompt + 8,192 response"
    assert terms["tokens a rank a step"] == "<= 1,179,648"  # 128 responses of 9,216
    assert terms["micro-batches a mini-batch a rank"] == "<= 8"  # 256 responses, 4 a micro-batch, 8 ranks


def test_weights_gradients_and_optimizer_state_by_hand():
    config = compose("recipe/disco_logl_1.5b")
    shape = KNOWN["DeepSeek-R1-Distill-Qwen-1.5B"]
    memory = estimate(config, shape, world_size=8)
    assert memory.weights == 2 * shape.parameters
    assert memory.gradients == 4 * shape.parameters
    assert memory.optimizer == 12 * shape.parameters // 8
    assert memory.kv_cache == 128 * 9216 * 28 * 2 * 256 * 2  # responses, tokens, layers, K and V, width, bytes


@pytest.mark.parametrize(
    ("overrides", "part", "least", "most"),
    [
        (["model.tensor_model_parallel_size=2"], "weights", 0.49, 0.51),
        (["model.tensor_model_parallel_size=2", "model.sequence_parallel=true"], "activations", 0.49, 0.51),
        (["model.pipeline_model_parallel_size=2"], "weights", 0.4, 0.6),
        (["model.context_parallel_size=2"], "activations", 0.49, 0.51),
        (["model.activations_checkpoint_granularity=null"], "activations", 5.0, 40.0),
        (["model.token_budget=73728"], "activations", 1.99, 2.01),
        (["trainer.precision=32"], "weights", 2.0, 2.0),
    ],
)
def test_a_layout_shrinks_what_it_splits(overrides, part, least, most):
    shape = KNOWN["DeepSeek-R1-Distill-Qwen-1.5B"]
    before = estimate(compose("recipe/disco_logl_1.5b"), shape, world_size=8)
    after = estimate(compose("recipe/disco_logl_1.5b", overrides), shape, world_size=8)
    assert least <= getattr(after, part) / getattr(before, part) <= most


def test_every_recipe_fits_an_80_gb_gpu_by_its_own_estimate():
    for size in ("1.5b", "7b", "llama_8b"):
        config = compose(f"recipe/disco_logl_{size}")
        shape, _ = find_shape(config.model.path)
        assert estimate(config, shape, world_size=8).training < 60 * 2**30  # with room for the KV cache


def test_the_plan_says_which_model_it_speaks_of(model_directory):
    text = printed(compose("recipe/disco_logl_7b"), 8)
    assert "7,615,616,512 parameters" in text
    assert "not found at models/DeepSeek-R1-Distill-Qwen-7B; this is the published shape" in text
    lengths = ["data.max_prompt_length=64", "generation.max_response_length=64"]
    text = printed(compose("quickstart", [f"model.path={model_directory()}", *lengths]), 2)
    assert "optimizer state" in text and f"Model: {model_directory()}" in text
    text = printed(compose("quickstart", ["model.path=nowhere"]), 2)
    assert "not found at nowhere, so there is no estimate" in text and "optimizer state" not in text
