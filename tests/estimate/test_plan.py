"""The plan: parameter counts are the published ones, memory is as computed by hand, and its text names the choices."""

import io
import re
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from nemo_disco.commands.plan import find_workload
from nemo_disco.config.compose import compose
from nemo_disco.config.consistency import check_consistency
from nemo_disco.estimate.memory import LIBRARIES, Layout, estimate_memory, host_memory
from nemo_disco.estimate.plan import batch_sizes, print_plan
from nemo_disco.estimate.timing import MEAN_LENGTH
from nemo_disco.estimate.trust_region import advise, k1_error, k3_error
from nemo_disco.models.shape import PUBLISHED, find_shape, read_shape
from nemo_disco.models.unbuilt import find_unbuilt
from nemo_disco.runtime.errors import UserError


def render_plan(config, world_size):
    """The plan as text."""
    console = Console(file=io.StringIO(), width=140)
    print_plan(config, world_size, find_workload(config), console)
    return console.file.getvalue()


def estimate_rank(config, shape, world_size=8):
    return estimate_memory(find_workload(config), shape, Layout.from_config(config.model, world_size))


@pytest.mark.parametrize(
    ("name", "published"),  # safetensors' own counts on the models' pages
    [
        ("DeepSeek-R1-Distill-Qwen-1.5B", 1_777_088_000),
        ("DeepSeek-R1-Distill-Qwen-7B", 7_615_616_512),
        ("DeepSeek-R1-Distill-Llama-8B", 8_030_261_248),
        ("DeepSeek-R1-Distill-Qwen-32B", 32_763_876_352),
        ("DeepSeek-R1-Distill-Llama-70B", 70_553_706_496),
        ("Qwen3-8B", 8_190_735_360),
        ("DeepSeek-R1-0528-Qwen3-8B", 8_190_735_360),
        ("Qwen3-30B-A3B", 30_532_122_624),
        ("Qwen3-235B-A22B", 235_093_634_560),
        ("Mixtral-8x7B", 46_702_792_704),
    ],
)
def test_the_papers_models_have_their_published_sizes(name, published):
    assert PUBLISHED[name].parameters == published


def test_a_shape_counts_what_transformers_builds(model_directory):
    from transformers import AutoConfig, AutoModelForCausalLM

    for changes in (
        {},
        {"tie_word_embeddings": False, "head_dim": 32},
        {"model_type": "llama"},
        {"model_type": "qwen3", "head_dim": 16},
    ):
        directory = model_directory(**changes)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
        assert read_shape(directory).parameters == sum(p.numel() for p in model.parameters())


def test_the_batch_sizes_of_the_papers():
    config = compose("recipe/disco_logl_1.5b")
    terms = dict(batch_sizes(find_workload(config), Layout(data=8), config.trainer.max_steps))
    assert terms["responses per step"] == "1,024 = 128 questions x 8 responses"
    assert terms["mini-batches per step"] == "4 of 32 questions, 256 responses each"
    assert terms["optimizer steps in the run"] == "5,600"
    assert terms["tokens per response"] == "<= 9,216 = 1,024 prompt + 8,192 response"
    assert terms["tokens per rank and step"] == "<= 1,179,648"  # 128 responses of 9,216
    assert terms["micro-batches per mini-batch and rank"] == "<= 8"  # 256 responses, 4 a micro-batch, 8 ranks


def test_weights_gradients_and_optimizer_state_by_hand():
    config = compose("recipe/disco_logl_1.5b")
    shape = PUBLISHED["DeepSeek-R1-Distill-Qwen-1.5B"]
    memory = estimate_rank(config, shape)
    assert memory.weights == 2 * shape.parameters
    assert memory.gradients == 4 * shape.parameters
    assert memory.optimizer == 12 * shape.parameters // 8
    layout = Layout.from_config(config.model, 8)
    with_reference = estimate_memory(replace(find_workload(config), reference=True), shape, layout)
    assert memory.reference == 0 and with_reference.reference == memory.weights
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
    shape = PUBLISHED["DeepSeek-R1-Distill-Qwen-1.5B"]
    whole = estimate_rank(compose("recipe/disco_logl_1.5b"), shape)
    split = estimate_rank(compose("recipe/disco_logl_1.5b", overrides), shape)
    assert least <= getattr(split, part) / getattr(whole, part) <= most


def test_every_recipe_fits_an_80_gb_gpu_by_its_own_estimate():
    for size in ("1.5b", "7b", "llama_8b"):
        config = compose(f"recipe/disco_logl_{size}")
        shape, _ = find_shape(config.model.path)
        assert estimate_rank(config, shape).training < 60 * 2**30  # with room for the KV cache


def test_activations_of_a_layer_by_hand():
    """bf16 on CUDA, per token: inputs and outputs of two norms; queries, keys and values before and after rope;
    attention's output twice and its log-sum-exp; SwiGLU's inputs and product. Full recomputation keeps those of one
    layer."""
    shape = PUBLISHED["DeepSeek-R1-Distill-Qwen-1.5B"]
    layer = 2 * (4 * 1536 + 4 * 1536 + 3 * 256 + 3 * 8960) + 4 * 12
    config = compose("recipe/disco_logl_1.5b", ["model.activations_checkpoint_granularity=null"])
    plain, full = estimate_rank(config, shape), estimate_rank(compose("recipe/disco_logl_1.5b"), shape)
    assert plain.activations == 36864 * 28 * layer
    assert full.activations == 36864 * 28 * 2 * 1536
    assert full.layer == plain.layer + 36864 * layer


def test_a_layer_of_experts_by_hand():
    """bf16 on CUDA, per token: the router's float32 logits, scores, weights and their scatter; for each of 8 copies the
    expert's input, SwiGLU's inputs and product, and that times the token's weight. In backward all experts at once."""
    shape, tokens = PUBLISHED["Qwen3-30B-A3B"], 36864
    norms_and_attention = 2 * (4 * 2048 + 4 * 4096 + 3 * 512 + 4096 + 512) + 4 * 32
    layer = norms_and_attention + 4 * 4 * 128 + 8 * 2 * (2048 + 4 * 768)
    gradients = 2 * (2 * 2048 + 8 * (2 * 2048 + 2 * 768))
    plain = ["model.activations_checkpoint_granularity=null", "model.tensor_model_parallel_size=1"]
    config = compose("recipe/disco_qwen3_30b_a3b", [*plain, "model.sequence_parallel=false"])
    memory = estimate_rank(config, shape, world_size=16)
    assert memory.activations == tokens * 48 * layer
    assert memory.layer == tokens * gradients


def test_the_first_stage_of_a_pipeline_is_the_fullest():
    """The first stage keeps a micro-batch for itself and one for each later stage, so the activations of as many layers
    as without a pipeline. Virtual stages keep PP - 1 more micro-batches of a virtual stage (arXiv 2104.04473).
    """
    plain = ["model.activations_checkpoint_granularity=null", "model.pipeline_model_parallel_size=4"]
    shape = PUBLISHED["DeepSeek-R1-Distill-Llama-8B"]
    name, virtual = "recipe/disco_logl_llama_8b", "model.virtual_pipeline_model_parallel_size=2"
    alone = estimate_rank(compose(name, plain[:1]), shape, world_size=32)
    piped = estimate_rank(compose(name, plain), shape, world_size=32)
    interleaved = estimate_rank(compose(name, [*plain, virtual]), shape, world_size=32)
    assert piped.activations == pytest.approx(alone.activations, rel=0.01)
    assert interleaved.activations == pytest.approx(piped.activations * (1 + 3 / 8), rel=0.01)


def test_the_plan_names_its_model(model_directory):
    text = render_plan(compose("recipe/disco_logl_7b"), 8)
    assert "7,615,616,512 parameters" in text
    assert "the published shape of DeepSeek-R1-Distill-Qwen-7B" in text and "no such directory" in text
    assert "DeepSeek-R1-Distill-Qwen-7B." in render_plan(compose("recipe/disco_logl_7b", ["model.path=7b"]), 8)
    lengths = ["data.max_prompt_length=64", "generation.max_response_length=64"]
    text = render_plan(compose("quickstart", [f"model.path={model_directory()}", *lengths]), 2)
    assert "optimizer state" in text and f"Model: {model_directory()}" in text
    text = render_plan(compose("quickstart", ["model.path=nowhere"]), 2)
    assert "nowhere: no Hugging Face model there" in text and "optimizer state" not in text
    assert "no estimate; known without files: model.path=1.5b, 7b, 8b, 32b, 70b" in text


@pytest.mark.parametrize("hub_id", ["Qwen/Qwen3-0.6B", "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"])
def test_the_plan_of_a_hub_id_says_how_to_fetch_it(hub_id):
    name = hub_id.rpartition("/")[2]
    text = render_plan(compose("quickstart", [f"model.path={hub_id}", "model.token_budget=8192"]), 2)
    assert f"hf download {hub_id} --local-dir models/{name}" in text


def test_a_path_that_cannot_be_looked_up_is_one_line():
    with pytest.raises(UserError, match="cannot be read"):
        find_shape("x" * 300)


def test_the_plan_recommends_a_layout_and_states_its_assumptions():
    text = render_plan(compose("recipe/disco_logl_7b", ["trainer.num_nodes=4"]), 32)
    assert "layouts on 32 GPUs of 80 GB" in text and "configured" in text and "recommended" in text
    assert "Recommended: model.tensor_model_parallel_size=" in text
    assert "estimated, not measured. Assumed: an H100 SXM" in text


def test_the_plan_counts_what_experts_exchange():
    """By hand: 7 of 8 copies of a token go to another rank and come back, in bf16, at half the full length."""
    text = render_plan(compose("recipe/disco_qwen3_30b_a3b", ["model.path=Qwen3-30B-A3B"]), 16)
    tokens = 128 * 8 * (1024 + 8192) * MEAN_LENGTH / 16
    sent = 48 * 2 * 8 * 7 / 8 * 2048 * 2 * tokens / 2**30
    assert f"EP 8 x ETP 1, as configured: a rank sends {sent:.1f} GiB to others" in text
    assert "30,532,122,624 parameters, 3,353,032,704 active" in text
    assert "Experts:" not in render_plan(compose("recipe/disco_logl_7b"), 8)


@pytest.mark.parametrize(
    ("name", "parameters", "active"),  # OpenAI's model card, in billions; active: without the embedding
    [("gpt-oss-20b", 20.91, 3.61), ("gpt-oss-120b", 116.83, 5.13)],
)
def test_a_published_model_that_is_not_built_has_its_published_size(name, parameters, active):
    from transformers import GptOssConfig, GptOssForCausalLM

    shape, _ = find_unbuilt(f"openai/{name}")
    config = GptOssConfig(num_hidden_layers=shape.layers, num_local_experts=shape.experts)
    with torch.device("meta"):
        assert shape.parameters == sum(p.numel() for p in GptOssForCausalLM(config).parameters())
    assert [kind == "sliding_attention" for kind in config.layer_types] == list(shape.windowed)
    assert shape.parameters / 1e9 == pytest.approx(parameters, abs=0.01)
    assert (shape.active_parameters - shape.embedding_parameters) / 1e9 == pytest.approx(active, abs=0.01)


def test_the_plan_of_a_model_that_is_not_built_says_so_first(tmp_path, monkeypatch):
    overrides = ["model.path=openai/gpt-oss-120b", "trainer.num_nodes=4"]
    text = render_plan(compose("recipe/disco_qwen3_30b_a3b", overrides), 32)
    assert text.startswith("gpt-oss-120b cannot be trained here yet: its attention has sinks")
    assert "116,829,156,672 parameters" in text and "Recommended: model." in text
    with pytest.raises(UserError, match="DeepSeek-V3 cannot be trained here yet: it has latent attention"):
        render_plan(compose("recipe/disco_qwen3_30b_a3b", ["model.path=DeepSeek-V3"]), 16)
    # A directory is read, whatever its name.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt-oss-20b").mkdir()
    (tmp_path / "gpt-oss-20b" / "config.json").write_text('{"model_type": "gpt_oss"}')
    with pytest.raises(UserError, match='model_type "gpt_oss" is not built'):
        render_plan(compose("recipe/disco_qwen3_30b_a3b", ["model.path=gpt-oss-20b"]), 16)


@pytest.mark.parametrize(("name", "nodes"), [("Qwen3-30B-A3B", 2), ("Mixtral-8x7B", 4), ("Qwen3-235B-A22B", 16)])
def test_the_recommended_keys_are_a_consistent_configuration(name, nodes):
    base = [f"model.path={name}", f"trainer.num_nodes={nodes}"]
    text = render_plan(compose("recipe/disco_qwen3_30b_a3b", base), 8 * nodes)
    (keys,) = re.findall(r"Recommended: (model\.[^.]\S*(?: model\.\S+[^.\s])+)", text)
    config = compose("recipe/disco_qwen3_30b_a3b", base + keys.split())
    check_consistency(config, 8 * nodes)
    assert "Recommended: the configured layout" in render_plan(config, 8 * nodes)


def test_the_plan_says_how_many_nodes_a_model_needs():
    text = render_plan(compose("recipe/disco_logl_7b", ["model.path=70b"]), 8)
    assert "No layout fits: TP 8 x PP 1 x CP 1 x DP 1 needs least" in text
    assert "Would work: trainer.num_nodes=4 with model.tensor_model_parallel_size=8" in text
    assert "does not fit" in text


def test_a_reference_policy_is_counted():
    overrides = ["model.path=8b", "data.train_files=[q.json]", "model.token_budget=16384"]
    assert "reference policy" in render_plan(
        compose(overrides=["algorithm=grpo", "algorithm.kl_coefficient=0.01", *overrides]), 1
    )
    assert "reference policy" not in render_plan(compose(overrides=overrides), 1)


def test_host_memory_counts_training_and_a_checkpoints_copy(monkeypatch):
    config = compose("recipe/disco_logl_7b", ["model.path=7b", "data.train_files=[q.json]"])
    memory = estimate_rank(config, PUBLISHED["DeepSeek-R1-Distill-Qwen-7B"])
    host = host_memory(memory, offload=False, cuda=True)
    assert host == LIBRARIES[True] + memory.optimizer
    assert host_memory(memory, offload=True, cuda=True) == host + memory.optimizer
    assert host_memory(memory, offload=False, cuda=False) == LIBRARIES[False] + memory.optimizer + memory.training
    for gibibytes, waits in ((2000, False), (64, True)):
        monkeypatch.setattr("nemo_disco.estimate.plan.total_memory", lambda gibibytes=gibibytes: gibibytes << 30)
        text = render_plan(config, 8)
        assert f"Host memory: {host / 2**30:.1f} GiB per process" in text and f"this host has {gibibytes}." in text
        assert ("training waits until they are written" in text) == waits


def test_the_constraints_advice_follows_the_tokens_of_a_mini_batch():
    """The authors' constraint suits their mini-batches; with few tokens k1 is noise, and delta is to be larger."""
    assert advise("k1", 1e-4, 2_097_152).endswith("Recommended: as configured.")
    few = advise("k1", 1e-4, 1_600)
    assert "at most 1,600 response tokens" in few
    assert few.endswith("Recommended: algorithm.constraint.estimator=k3 algorithm.constraint.delta=0.001.")
    assert advise("k3", 1e-3, 1_600).endswith("Recommended: as configured.")
    assert advise("top_k", 1e-1, 1_600).endswith("Recommended: algorithm.constraint.delta=0.001.")
    assert advise("k1", 0.0, 1_600).endswith("algorithm.constraint.estimator=k3 algorithm.constraint.delta=0.001.")


def test_the_errors_of_the_estimators_are_those_that_were_measured():
    """Mini-batches of 1,600 tokens at a KL of 1.4e-3: standard deviations of 1.5e-3 (k1) and 2.2e-4 (k3)."""
    assert k1_error(1.4e-3, 1_600) == pytest.approx(1.5e-3, rel=0.15)
    assert k3_error(1.4e-3, 1_600) == pytest.approx(2.2e-4, rel=0.15)


def test_the_likely_tokens_of_a_step_count_in_host_memory():
    top_k = ["algorithm.constraint.estimator=top_k", "algorithm.constraint.top_k=16"]
    shape = PUBLISHED["DeepSeek-R1-Distill-Qwen-1.5B"]
    without, with_tokens = (
        estimate_rank(compose("recipe/disco_logl_1.5b", overrides), shape) for overrides in ([], top_k)
    )
    tokens = 128 * 8 * 8192
    assert with_tokens.likely_tokens == tokens * 16 * 8 and without.likely_tokens == 0
    difference = host_memory(with_tokens, offload=False, cuda=True) - host_memory(without, offload=False, cuda=True)
    assert difference == tokens * 128
