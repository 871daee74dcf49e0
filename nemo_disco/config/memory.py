"""An estimate of one rank's memory, by part, from the configuration and the model's shape. Pure arithmetic.

Counts what is large: sharded weights, megatron's gradient buffer, the distributed optimizer's share, what autograd
keeps of a full micro-batch, log-probs, the KV cache. Not the allocator's slack, the libraries or NCCL's buffers.
"""

from __future__ import annotations

from dataclasses import dataclass

from nemo_disco.config.schema import RunConfig
from nemo_disco.config.shape import ModelShape

# Bytes a number: of weights and activations, of megatron's gradient buffer, and of the optimizer's state with Adam
# (two moments, and under bf16 an fp32 copy of the weights).
_BYTES = {"bf16": (2, 4, 12), "32": (4, 4, 8), "64": (8, 8, 16)}
_TILE = 4096 * 16384  # logits of the largest tile that the log-probs hold, in float32
_STEP_COPIES = 4 * 8  # old, new and generation log-probs and token weights of a step, 8 bytes each at most


@dataclass(frozen=True)
class Memory:
    """Bytes of the fullest rank. kv_cache: all of the rank's responses at full length, at once."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    log_probs: int
    kv_cache: int

    @property
    def training(self) -> int:
        """What one training step needs at the same time."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.log_probs


def estimate(config: RunConfig, shape: ModelShape, world_size: int) -> Memory:
    """The memory of the fullest rank among `world_size`, at full micro-batches and full-length responses."""
    model, numbers = config.model, _BYTES[config.trainer.precision]
    tensor, pipeline = model.tensor_model_parallel_size, model.pipeline_model_parallel_size
    context = model.context_parallel_size
    parameters = _stage_parameters(shape, tensor, pipeline)
    replicas = world_size // (tensor * pipeline)
    data_parallel = replicas // context
    responses = config.data.questions_per_step * config.generation.responses_per_question
    longest = config.data.max_prompt_length + config.generation.longest_response
    cache = 2 * numbers[0] * (shape.layers // pipeline) * shape.kv_width // tensor
    return Memory(
        weights=parameters * numbers[0],
        gradients=parameters * numbers[1],
        optimizer=parameters * numbers[2] // replicas,
        activations=_activations(config, shape) * numbers[0],
        log_probs=responses * config.generation.longest_response * _STEP_COPIES
        + 4 * min(_TILE, model.token_budget // context * shape.vocab // tensor),
        # Context-parallel ranks sample as further data-parallel ones.
        kv_cache=-(-responses // (data_parallel * context)) * longest * cache,
    )


def _stage_parameters(shape: ModelShape, tensor: int, pipeline: int) -> int:
    """Of the fullest pipeline stage on one tensor-parallel rank."""
    layers = shape.layers // pipeline * shape.layer_parameters
    # One stage: embedding and output layer, which may be one. Several: either end has one of the two.
    embeddings = shape.embedding_parameters * (2 if pipeline == 1 and not shape.tied else 1)
    return (layers + embeddings) // tensor + shape.hidden


def _activations(config: RunConfig, shape: ModelShape) -> int:
    """Numbers that autograd keeps on the first pipeline stage, with its 1F1B micro-batches in flight."""
    model = config.model
    tensor, pipeline = model.tensor_model_parallel_size, model.pipeline_model_parallel_size
    # A token in a layer: both norms' inputs and outputs; then queries, keys and values before and after rope, the
    # attention's output, and SwiGLU's gate, up, activation and product.
    whole = 4 * shape.hidden // (tensor if model.sequence_parallel else 1)
    split = (3 * shape.query_width + 4 * shape.kv_width + 4 * shape.ffn) // tensor
    tokens, layers = model.token_budget // model.context_parallel_size, shape.layers // pipeline
    if model.activations_checkpoint_granularity == "full":
        return tokens * (layers * pipeline * whole // 4 + whole + split)
    if model.activations_checkpoint_granularity == "selective":
        split -= shape.query_width // tensor
    return tokens * layers * pipeline * (whole + split)
