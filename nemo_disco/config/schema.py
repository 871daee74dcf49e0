"""Types and bounds of a run's configuration, one frozen section per concern; conf/ holds the values.

Each package gets its own section and reads no other. Keys of the parallel layout are Megatron's and NeMo's own.
Unknown keys are refused. consistency.py checks keys against each other.
"""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

LARGEST_INT = 2**31 - 1  # a larger value is a typing error; torch and numpy accept seeds up to this on any system
PositiveInt = Annotated[int, Field(ge=1, le=LARGEST_INT)]
NonNegativeInt = Annotated[int, Field(ge=0, le=LARGEST_INT)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0, le=1)]


# A path; ~ is the home directory.
PathText = Annotated[str, BeforeValidator(lambda path: os.path.expanduser(path) if type(path) is str else path)]


class Section(BaseModel):
    """A frozen section that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TrainerConfig(Section):
    max_steps: PositiveInt  # steps of the loop: one generation, several mini-batches
    num_nodes: PositiveInt
    devices: PositiveInt  # processes per node: one per GPU, or CPU processes
    precision: Annotated[Literal["32", "bf16", "64"], BeforeValidator(lambda p: str(p) if type(p) is int else p)]
    gradient_clip_val: NonNegativeFloat  # global norm; 0 is off


class ExpManagerConfig(Section):
    explicit_log_dir: PathText  # the run directory
    resume_if_exists: bool
    checkpoint_every_n_steps: PositiveInt
    keep_checkpoints: PositiveInt
    saved_rollouts: NonNegativeInt  # number of a step's responses that are written to rollouts/
    tensorboard: bool
    wandb: bool
    mlflow: bool
    profile_steps: list[PositiveInt]  # steps whose trace is written to profile/


class SchedConfig(Section):
    name: Literal["constant", "linear", "cosine"]
    warmup_steps: NonNegativeInt  # in optimizer steps (mini-batches)
    min_lr: NonNegativeFloat


class OptimConfig(Section):
    name: Literal["adam"]  # AdamW; the one that megatron-core's distributed optimizer has
    lr: NonNegativeFloat
    weight_decay: NonNegativeFloat
    betas: tuple[float, float]
    eps: PositiveFloat
    moments_dtype: Literal["float32", "bfloat16"]  # bfloat16 needs Transformer Engine
    offload: bool  # keep the optimizer's state in host memory while an engine samples
    sched: SchedConfig


class ModelConfig(Section):
    path: PathText  # a Hugging Face directory (config, tokenizer, safetensors); to evaluate, a checkpoint or a run too
    tensor_model_parallel_size: PositiveInt
    pipeline_model_parallel_size: PositiveInt
    virtual_pipeline_model_parallel_size: PositiveInt | None
    context_parallel_size: PositiveInt
    expert_model_parallel_size: PositiveInt
    expert_tensor_parallel_size: PositiveInt | None  # null: as tensor_model_parallel_size
    # A step's passes take the experts of the old log-probs' pass (trainer) or of the engine's (engine, by vllm).
    moe_router_replay: Literal["none", "trainer", "engine"]
    sequence_parallel: bool
    activations_checkpoint_granularity: Literal["selective", "full"] | None
    token_budget: PositiveInt  # tokens (prompts, responses and padding) in one micro-batch
    trust_remote_code: bool
    transformer_engine: bool | None  # layer implementation; null: true on CUDA where it is installed
    fp8: Literal["delayed", "current", "blockwise"] | None  # Transformer Engine's scaling; null is no FP8
    fp8_param_gather: bool  # keep and gather the weights in FP8 too
    apply_rope_fusion: bool  # by Transformer Engine
    bias_activation_fusion: bool  # by megatron-core
    optim: OptimConfig

    @property
    def fp8_tokens(self) -> int:
        """Divisor that FP8 matrix products require of a micro-batch's number of tokens; 1 without FP8."""
        return {None: 1, "delayed": 16, "current": 16, "blockwise": 128}[self.fp8]


class AlgorithmConfig(Section):
    """The training loop's keys. Any other key is a parameter of the objective, which `build_objective` checks.

    null leaves a parameter at the default that its objective declares.
    """

    model_config = ConfigDict(extra="allow")

    name: str  # an objective of nemo_disco.algorithms.objectives, or my_module:MyObjective
    parameters: dict[str, Any]  # more parameters of the objective; one named here wins over algorithm.NAME
    constraint: dict[str, Any]  # fields of algorithms.objectives.Constraint
    off_policy: dict[str, Any]  # fields of algorithms.objectives.off_policy.OffPolicy
    threshold: FiniteFloat  # a response is correct if its verdict is above this
    mini_batch_questions: PositiveInt  # questions per optimizer step
    dynamic_sampling_rounds: NonNegativeInt  # the most times to sample more questions until enough groups are mixed
    reference_reset_steps: NonNegativeInt  # every so many steps the policy becomes the reference; 0: never

    def objective(self) -> dict[str, Any]:
        """The mapping that `build_objective` takes: the name and the objective's parameters."""
        loop_keys = {"mini_batch_questions", "dynamic_sampling_rounds", "reference_reset_steps", "parameters"}
        return self.model_dump(exclude=loop_keys) | self.parameters


class GenerationConfig(Section):
    engine: Literal["megatron", "vllm", "tensorrt_llm"]
    responses_per_question: PositiveInt
    temperature: PositiveFloat
    top_p: Fraction
    top_k: NonNegativeInt  # 0 is off
    max_response_length: PositiveInt  # tokens, EOS included
    response_length_schedule: list[tuple[PositiveInt, PositiveInt]]  # [n, tokens]: the limit after n steps
    # Only for engines that run in processes of their own (vllm, tensorrt_llm):
    python: PathText | None  # interpreter of the environment that the engine is installed in
    replicas: PositiveInt  # per node
    tensor_parallel_size: PositiveInt  # of one replica
    colocated: bool  # on the training GPUs, asleep while the policy trains; false: on the node's other GPUs
    asynchronous: bool  # sample the next step's rollouts with the current weights while the policy trains
    nodes: list[str]  # separate hosts for the replicas, reached by srun or ssh; empty: the training nodes
    quantization: str | None  # the engine's name for it (fp8, ...); an engine without it refuses
    options: dict[str, Any]  # more arguments of the engine's constructor, by its own names

    def response_limit(self, step: int) -> int:
        """Response limit in tokens of the step that comes after `step` finished steps."""
        reached = [limit for after, limit in self.response_length_schedule if after <= step]
        return max([self.max_response_length, *reached])

    @property
    def longest_response(self) -> int:
        """Response limit in tokens at the end of the schedule, for memory and positions; evaluation uses it."""
        return max([self.max_response_length, *(limit for _, limit in self.response_length_schedule)])


class DataConfig(Section):
    train_files: list[PathText]  # may be empty for evaluate and plan
    train_weights: list[PositiveFloat] | None  # per file: how often an epoch samples its questions; null is 1 each
    questions_per_step: PositiveInt
    max_prompt_length: PositiveInt  # tokens, after the chat template
    too_long: Literal["error", "drop"]  # a longer question: stop, or drop it and log how many
    max_bad_records: Annotated[float, Field(ge=0, le=1)]  # largest share of malformed records, which are left out
    if_changed: Literal["error", "restart"]  # questions differ from the checkpoint's: stop, or start over with the new
    prompt_suffix: str  # appended to the question's text
    system_prompt: str | None  # for questions without one of their own
    chat_template_kwargs: dict[str, Any]  # arguments of the chat template besides the conversation
    shuffle: bool


class RewardTermsConfig(Section):
    """Weights of the terms of the reward, which is their weighted sum."""

    correctness: FiniteFloat  # the grader's verdict, 0 or 1
    format: FiniteFloat  # 1 for a complete answer, right or wrong
    length: FiniteFloat  # 1 - |o|/C, C the response limit
    overlong: FiniteFloat  # DAPO's: down to -1 in the last overlong_buffer tokens


class RewardConfig(Section):
    verifier: str  # math, exact, numeric, choice, python_tests, or module:name of your own
    parameters: dict[str, Any]  # arguments of the verifier besides the keys below
    terms: RewardTermsConfig
    function: str | None  # module:function of your own, added to the terms; it takes a rewards.GradedResponse
    overlong_buffer: PositiveInt | None  # tokens; null is a fifth of the response limit
    require_think: bool  # reward only the text after </think>
    timeout: PositiveFloat  # seconds per answer
    workers: PositiveInt  # grader processes per node


class EvaluationConfig(Section):
    enabled: bool
    files: list[PathText]
    samples: PositiveInt  # k of avg@k
    temperature: PositiveFloat
    top_p: Fraction
    max_questions: PositiveInt | None  # the first n of each file; null is all
    every_n_steps: NonNegativeInt  # 0: only before and after training
    reference: PathText | None  # a run directory: accuracy and length are compared with its evaluations (AES)


class VerifyConfig(Section):
    dtype: Literal["float32", "float64", "bfloat16"] | None  # null is trainer.precision
    rollouts: PathText | None  # read if the file exists, else written
    save_gradients: PathText | None  # safetensors file for one mini-batch's gradient, by Hugging Face names
    reference: Literal["transformers"] | None  # compare the network with transformers', module by module
    perturb: NonNegativeFloat  # scale of the seeded noise on theta after the old log-probs
    max_mismatch: PositiveFloat  # limit of the mean exp|trainer - engine| of the sampled tokens' log-probs
    max_kl: PositiveFloat | None  # limit of their KL (k3), nats per token; null: by precision (agreement.py)


class PlanConfig(Section):
    gpu_memory_gb: PositiveFloat | None  # of the GPUs to plan for; null: this machine's, or 80


class RunConfig(Section):
    """All sections of a run."""

    seed: NonNegativeInt
    trainer: TrainerConfig
    exp_manager: ExpManagerConfig
    model: ModelConfig
    algorithm: AlgorithmConfig
    generation: GenerationConfig
    data: DataConfig
    reward: RewardConfig
    evaluation: EvaluationConfig
    verify: VerifyConfig
    plan: PlanConfig
