"""Keys that contradict each other are refused before anything is built, with a message that names values that work."""

import pytest

from nemo_disco.commands.checks import check_files, check_objective
from nemo_disco.config.compose import compose
from nemo_disco.config.consistency import check_consistency
from nemo_disco.runtime.errors import UserError

# (overrides, number of processes, part of the message about the contradiction, part about the remedy).
CONTRADICTIONS = [
    (["model.tensor_model_parallel_size=2", "model.context_parallel_size=2"], 6,
     "TP 2 x PP 1 x CP 2 needs a multiple of 4 processes, but there are 6", "would work: 4, 8"),
    (["model.pipeline_model_parallel_size=4"], 2, "but there are 2", "would work: 4"),
    (["model.sequence_parallel=true"], 2, "tensor_model_parallel_size above 1", ""),
    (["model.virtual_pipeline_model_parallel_size=2"], 2, "pipeline_model_parallel_size above 1", ""),
    (["data.questions_per_step=30", "algorithm.mini_batch_questions=8"], 2,
     "mini_batch_questions=8 does not divide data.questions_per_step=30", "would work: 1, 2, 3, 5, 6, 10, 15, 30"),
    (["data.questions_per_step=32", "algorithm.mini_batch_questions=64"], 2, "=64 does not divide", "16, 32"),
    (["model.token_budget=255", "data.max_prompt_length=128", "generation.max_response_length=128"], 2,
     "model.token_budget=255 is smaller than one response with its prompt: data.max_prompt_length=128 + "
     "generation.max_response_length=128 = 256", "would work: model.token_budget=256 or more"),
    (["model.token_budget=255", "data.max_prompt_length=127", "generation.max_response_length=126",
      "model.context_parallel_size=2"], 2, "= 253", "would work: model.token_budget=256 or more"),
    (["generation.responses_per_question=1"], 2, "disco compares the responses of a question", "would work: 2 or more"),
    (["generation.quantization=fp8"], 2, "quantization=fp8: not for generation=megatron", "leave it out"),
    (["generation.replicas=2"], 2, "replicas=2: not for generation=megatron", "leave it out"),
    (["model.moe_router_replay=engine"], 2, "generation=megatron does not return its experts", "generation=vllm, or"),
    (["generation=vllm", "generation.top_p=0.9"], 2, "generation.top_p=0.9, generation.top_k=0", "top_p=1.0"),
    (["generation=vllm", "generation.python=null"], 2, "generation.python", "docs/engines.md"),
    (["generation=tensorrt_llm", "trainer.precision=64"], 2, "tensorrt_llm has no float64", "32, bf16"),
    (["generation=vllm", "generation.nodes=[a,a]"], 2, "names a host twice", "generation.replicas"),
    (["generation.asynchronous=true"], 2, "=true is not possible with generation=megatron", "generation=vllm or"),
    (["generation=vllm", "generation.asynchronous=true"], 2, "generation.colocated=true puts the engine to sleep",
     "generation.colocated=false, or generation.nodes"),
    (["generation=vllm", "generation.asynchronous=true", "generation.nodes=[a]"], 2, "choose the correction for it",
     "algorithm.off_policy.kind=truncated_importance_sampling, sequence_importance_sampling, icepop, sequence_mask, "
     "outlier_mask, or none"),
    (["model.optim.betas=[0.9,1.0]"], 2, "model.optim.betas=[0.9, 1.0]", "below 1"),
    (["model.optim.lr=1e-6", "model.optim.sched.min_lr=1e-5"], 2, "min_lr=1e-05 is above model.optim.lr=1e-06", ""),
    (["model.fp8_param_gather=true"], 2, "model.fp8_param_gather=true needs model.fp8", "delayed, current or"),
    (["model.fp8=current"], 2, "model.fp8=current needs trainer.precision=bf16, not 32", ""),
    (["model.fp8=delayed", "trainer.precision=bf16", "model.transformer_engine=false"], 2,
     "model.fp8 is Transformer Engine's, and model.transformer_engine=false", "set it to null or true"),
    (["model.apply_rope_fusion=true", "model.transformer_engine=false"], 2, "model.apply_rope_fusion is", "to null or"),
    (["model.token_budget=255", "data.max_prompt_length=127", "generation.max_response_length=126", "model.fp8=current",
      "trainer.precision=bf16"], 2, "= 253", "would work: model.token_budget=256 or more"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "world_size", "contradiction", "remedy"), CONTRADICTIONS)
def test_keys_that_contradict_each_other_are_refused(overrides, world_size, contradiction, remedy):
    with pytest.raises(UserError) as raised:
        check_consistency(compose("quickstart", overrides), world_size)
    assert contradiction in str(raised.value)
    assert remedy in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.tensor_model_parallel_size=2", "model.sequence_parallel=true"],
        ["model.pipeline_model_parallel_size=2", "model.virtual_pipeline_model_parallel_size=2"],
        ["data.max_prompt_length=128", "generation.max_response_length=128", "model.token_budget=256"],
        ["generation.responses_per_question=1", "algorithm.name=my_module:Mine"],
        # This engine reports log-probs of the whole distribution also where it samples from a part of it.
        ["generation.top_p=0.9", "generation.top_k=20", "algorithm.off_policy.kind=icepop"],
        *(
            ["trainer.precision=bf16", f"model.fp8={recipe}", "model.fp8_param_gather=true"]
            for recipe in ("delayed", "current", "blockwise")
        ),
        [
            "generation=vllm",
            "generation.asynchronous=true",
            "generation.colocated=false",
            "algorithm.off_policy.kind=truncated_importance_sampling",
        ],
    ],
)
def test_consistent_keys_pass(overrides):
    check_consistency(compose("quickstart", overrides), world_size=4)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["algorithm=grpo", "algorithm.tau=1"], "objective grpo does not take 'tau'"),
        (["algorithm.name=disko"], "there is no objective 'disko'; known: disco,"),
        (["algorithm.tau=0"], "tau must be above 0"),
    ],
)
def test_an_objective_that_cannot_be_built_is_refused_before_the_model_is_read(overrides, line):
    with pytest.raises(UserError, match=line):
        check_objective(compose("quickstart", overrides))


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["model.tensor_model_parallel_size=3"], "=3 does not divide the model's 4 attention heads; would work: 1, 2$"),
        (["model.tensor_model_parallel_size=4"], "=4 does not divide the model's 2 key-value heads; would work: 1, 2$"),
        (["model.pipeline_model_parallel_size=3"], "=3 does not divide the model's 4 layers; would work: 1, 2, 4$"),
        (
            ["model.pipeline_model_parallel_size=2", "model.virtual_pipeline_model_parallel_size=4"],
            "pipeline_model_parallel_size x virtual_pipeline_model_parallel_size=8 does not divide",
        ),
        (["model.moe_router_replay=engine"], "moe_router_replay=engine: this model has no experts; leave it out$"),
        (["generation.max_response_length=400"], "data.max_prompt_length=128 .* = 528 tokens, but .* 512 positions"),
    ],
)
def test_a_layout_or_length_that_the_model_cannot_have_is_refused(overrides, line, model_directory):
    config = compose("quickstart", [f"model.path={model_directory()}", "data.max_prompt_length=128", *overrides])
    with pytest.raises(UserError, match=line):
        check_files(config, "verify")


@pytest.fixture
def usable(model_directory, tmp_path):
    """Overrides that name existing files and a run directory that can be created."""
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"problem": "1+1", "answer": "2"}\n')
    return [
        f"model.path={model_directory()}",
        f"data.train_files=[{questions}]",
        f"evaluation.files=[{questions}]",
        f"exp_manager.explicit_log_dir={tmp_path / 'run'}",
        "data.max_prompt_length=64",
        "generation.max_response_length=64",
    ]


def test_usable_files_pass_and_only_the_first_rank_makes_the_run_directory(usable, tmp_path):
    config = compose("quickstart", usable)
    check_files(config, "train", first_rank=False)
    assert not (tmp_path / "run").exists()
    check_files(config, "train")
    assert (tmp_path / "run").is_dir()


@pytest.mark.parametrize(
    ("command", "override", "line"),
    [
        ("train", "model.path=nowhere", "nowhere: no Hugging Face model there"),
        ("train", "data.train_files=[nowhere.json]", "data.train_files: there is no nowhere.json"),
        ("train", "data.train_files=[]", "data.train_files must be given to train"),
        ("train", "evaluation.files=[nowhere.json]", "evaluation.files: there is no nowhere.json"),
        ("evaluate", "evaluation.files=[]", "evaluation.files is empty"),
        ("evaluate", "evaluation.files=[nowhere.json]", "evaluation.files: there is no nowhere.json"),
        ("train", "exp_manager.explicit_log_dir=/dev/null/run", "run directory /dev/null/run cannot be written"),
    ],
)
def test_a_missing_file_is_named(usable, command, override, line):
    with pytest.raises(UserError, match=line):
        check_files(compose("quickstart", [*usable, override]), command)


def test_files_that_a_command_does_not_read_may_be_missing(usable):
    check_files(compose("quickstart", [*usable, "data.train_files=[nowhere.json]"]), "evaluate")
    check_files(compose("quickstart", [*usable, "evaluation.files=[x.json]", "evaluation.enabled=false"]), "train")


@pytest.mark.parametrize("command", ["train", "evaluate", "verify"])
def test_a_model_without_safetensors_is_refused_naming_the_file_it_has(usable, model_directory, tmp_path, command):
    (model_directory() / "model.safetensors").rename(tmp_path / "model/model-Q8_0.gguf")
    with pytest.raises(UserError, match=r"no \*\.safetensors file of the model there: model-Q8_0\.gguf is a GGUF file"):
        check_files(compose("quickstart", usable), command)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("{", "not valid JSON"),
        ('{"hidden_size": 64}', "model_type null is not built"),
        ("[]", "not a JSON object"),
    ],
)
def test_a_damaged_model_config_is_refused(usable, model_directory, text, line):
    (model_directory() / "config.json").write_text(text)
    with pytest.raises(UserError, match=line) as raised:
        check_files(compose("quickstart", usable), "train")
    assert "config.json" in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("schedule", ["[[5,64]]", "[[5,100],[5,110]]", "[[5,100],[9,90]]"])
def test_a_schedule_whose_steps_or_response_limits_do_not_rise_is_refused(schedule):
    with pytest.raises(UserError, match=r"generation.response_length_schedule: \[\d+, \d+\] after .* must both rise"):
        check_consistency(compose("quickstart", [f"generation.response_length_schedule={schedule}"]), 2)


def test_the_last_response_limit_must_fit_the_token_budget():
    overrides = ["generation.response_length_schedule=[[5,5000]]"]
    with pytest.raises(UserError, match=r"generation.response_length_schedule=5000 = 5096; would work"):
        check_consistency(compose("quickstart", overrides), 2)


def test_a_reference_reset_needs_a_reference():
    reset = "algorithm.reference_reset_steps=5"
    with pytest.raises(UserError, match="objective disco has no reference as it is set"):
        check_objective(compose("quickstart", [reset]))
    check_objective(compose("quickstart", [reset, "algorithm=grpo", "algorithm.kl_coefficient=1e-3"]))
