"""Estimate of one rank's memory, by part, from the configuration and the model's shape. Pure arithmetic.

Counts the large parts, for the local layers; tests/distributed/test_memory.py compares it with real processes' peaks.
Not counted: libraries, the allocator's slack, NCCL's buffers (layouts.USABLE), FP8. `cuda=True`: not run.
"""

from __future__ import annotations

from dataclasses import dataclass

from nemo_disco.config.schema import ModelConfig
from nemo_disco.models.shape import ModelShape

# Bytes per number, by precision: weights and activations, megatron's gradient buffer, and Adam's state (two moments,
# and under bf16 an fp32 copy of the weights).
BYTES = {"bf16": (2, 4, 12), "32": (4, 4, 8), "64": (8, 8, 16)}
_TILES = {True: 4096 * 8192, False: 512 * 1024}  # logits per tile of the log-probs (policy/log_probs.py), by CUDA
LIBRARIES = {True: 4 << 30, False: 1 << 29}  # host memory of a process without its policy, by CUDA (assumed there)
_VECTORS = 4 * 8  # old, new and generation log-probs and token weights of a step, at most 8 bytes each


@dataclass(frozen=True)
class Workload:
    """One step's work, as the settings and the objective define it, whatever the layout. Limits are in tokens."""

    questions: int  # per step
    mini_batch_questions: int
    group: int  # responses per question
    prompt_limit: int
    response_limit: int
    token_budget: int  # of a micro-batch
    precision: str
    moments_dtype: str
    offload: bool  # the optimizer's state is on the host while an engine samples
    engine: str
    two_passes: bool = True  # the objective is not separable: all mini-batches but the first take a pass for log-probs
    reference: bool = False  # the objective needs a second, frozen policy
    engine_routes: bool = False  # the experts of the engine's pass are replayed
    likely_tokens: int = 0  # tokens whose log-probs the constraint compares at each place (its estimator top_k)
    estimator: str = ""  # of the constraint's KL
    delta: float | None = None  # the constraint's limit on the KL, in nats per token; None: it has none

    @property
    def full_length(self) -> int:
        """Tokens of a sequence of full length."""
        return self.prompt_limit + self.response_limit


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel groups, and the recomputation in backward (None, selective, full).

    expert: ranks among which a layer's experts are split, and expert_tensor those among which each expert is.
    """

    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    context: int = 1
    data: int = 1
    sequence_parallel: bool = False
    recompute: str | None = None
    expert: int = 1
    expert_tensor: int = 1

    @classmethod
    def from_config(cls, model: ModelConfig, world_size: int) -> Layout:
        tensor, pipeline = model.tensor_model_parallel_size, model.pipeline_model_parallel_size
        context = model.context_parallel_size
        return cls(
            tensor=tensor,
            pipeline=pipeline,
            virtual=model.virtual_pipeline_model_parallel_size or 1,
            context=context,
            data=world_size // (tensor * pipeline * context),
            sequence_parallel=model.sequence_parallel,
            recompute=model.activations_checkpoint_granularity,
            expert=model.expert_model_parallel_size,
            expert_tensor=model.expert_tensor_parallel_size or tensor,
        )

    @property
    def model_ranks(self) -> int:
        """Ranks that hold one copy of the model, context-parallel ranks included."""
        return self.tensor * self.pipeline * self.context

    @property
    def ranks(self) -> int:
        return self.model_ranks * self.data

    @property
    def shares(self) -> int:
        """Ranks that share the distributed optimizer's state, and that sample different questions."""
        return self.data * self.context

    @property
    def expert_shares(self) -> int:
        """Ranks that share the distributed optimizer's state of the experts."""
        return self.ranks // (self.pipeline * self.expert * self.expert_tensor)


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, by part. activations: kept for backward. log_probs: buffers of log-probs and final norm.
    layer: of one layer's backward, once log_probs is freed, with its recomputed activations if any. kv_cache: of all
    the rank's responses at once, at full length. likely_tokens, routes: of the
    old policy, in host memory."""

    weights: int
    gradients: int
    optimizer: int
    reference: int
    activations: int
    log_probs: int
    layer: int
    kv_cache: int
    likely_tokens: int
    routes: int

    @property
    def training(self) -> int:
        """Bytes at the peak of a training step."""
        standing = self.weights + self.gradients + self.optimizer + self.reference
        return standing + self.activations + max(self.log_probs, self.layer)

    def sampling(self, *, offload: bool) -> int:
        """Bytes in use while an engine samples, without its cache: no gradients, with `offload` no optimizer state."""
        return self.weights + self.reference + (0 if offload else self.optimizer)


def host_memory(memory: Memory, *, offload: bool, cuda: bool) -> int:
    """Peak bytes of host memory of one rank: its libraries, a checkpoint's copy of the optimizer's state while it is
    written, the old policy's likely tokens and, without CUDA, training itself.

    offload: the optimizer's state is on the host while an engine samples. A resume reads as many bytes as the copy has,
    before there are activations.
    """
    on_host = memory.optimizer * (2 if offload and cuda else 1)
    return LIBRARIES[cuda] + on_host + memory.likely_tokens + memory.routes + (0 if cuda else memory.training)


def estimate_memory(work: Workload, shape: ModelShape, layout: Layout, *, cuda: bool = True) -> Memory:
    """Estimate the memory of the fullest rank, at full micro-batches and full-length responses."""
    stages = {0, layout.pipeline - 1}
    return max((_stage_memory(work, shape, layout, s, cuda) for s in stages), key=lambda m: m.training)


def cache_per_response(work: Workload, shape: ModelShape, layout: Layout) -> int:
    """Bytes of the keys and values of a sequence of full length on one rank."""
    layers = shape.layers // layout.pipeline
    return 2 * BYTES[work.precision][0] * layers * shape.kv_width // layout.tensor * work.full_length


def responses_per_rank(work: Workload, layout: Layout) -> int:
    """Responses that a rank samples in a step; a question's responses stay together."""
    return -(-work.questions // layout.shares) * work.group


def micro_batches(work: Workload, layout: Layout, tokens: float) -> int:
    """Micro-batches per rank for so many tokens on all ranks; under VPP a multiple of PP."""
    multiple = layout.pipeline if layout.virtual > 1 else 1
    count = max(1, -(-int(tokens) // (layout.data * work.token_budget)))
    return -(-count // multiple) * multiple


def _stage_memory(work: Workload, shape: ModelShape, layout: Layout, stage: int, cuda: bool) -> Memory:
    weight, gradient, optimizer = BYTES[work.precision]
    if work.moments_dtype == "bfloat16":
        optimizer -= 4
    dense, experts = _stage_parameters(shape, layout)
    parameters = dense + experts
    tokens = work.token_budget // layout.context
    # Without CUDA's kernels torch materializes the mask of context parallelism: over half of the sequence per query.
    mask = 0 if cuda or layout.context == 1 else work.full_length * (2 * layout.context + 1) // (4 * layout.context)
    layer = _saved_by_layer(shape, layout, weight, cuda, mask)
    recomputed = layout.recompute == "full"
    saved = weight * shape.hidden // _shards(layout) if recomputed else layer  # its input alone, or all
    head = 0
    if stage == layout.pipeline - 1:
        wide = max(weight, 4)
        # The hidden states at response tokens, their gradient, the output weight's, and tiles of logits and gradients.
        head = tokens * shape.hidden * (weight + wide) + shape.embedding_parameters // layout.tensor * weight
        head += 2 * wide * min(_TILES[cuda], tokens * shape.vocab // layout.tensor)
        head += tokens * _norm(shape, layout, weight, cuda)
    responses = work.questions * work.group
    return Memory(
        weights=parameters * weight,
        gradients=parameters * gradient,
        optimizer=dense * optimizer // layout.shares + experts * optimizer // layout.expert_shares,
        reference=parameters * weight if work.reference else 0,
        activations=int(tokens * shape.layers // layout.pipeline * _in_flight(work, layout, stage) * saved),
        log_probs=head + responses * work.response_limit * _VECTORS,
        layer=tokens * weight * _gradient_width(shape, layout, cuda)
        + (tokens * layer if layout.recompute == "full" else 0),
        kv_cache=responses_per_rank(work, layout) * cache_per_response(work, shape, layout),
        # Ids of 4 bytes and log-probs, of all responses of a step on every rank.
        likely_tokens=responses * work.response_limit * work.likely_tokens * (4 + max(weight, 4)),
        # A byte for each token, layer and chosen expert, unless model.moe_router_replay is none. The engine's are of
        # all layers, in the responses and in the rollouts.
        routes=responses
        * work.full_length
        * (2 * shape.layers if work.engine_routes else shape.layers // layout.pipeline)
        * shape.experts_per_token,
    )


def _gradient_width(shape: ModelShape, layout: Layout, cuda: bool) -> int:
    """Numbers per token of a layer's gradients in backward: of SwiGLU's two inputs and of the layer's input, which is
    gathered anew under SP. With experts these are of each copy of a token that goes to one: SwiGLU's only on CUDA,
    where one module computes all experts at once; else they are computed one at a time."""
    if not shape.experts:
        return 2 * shape.ffn // layout.tensor + 2 * shape.hidden
    copy = 2 * shape.hidden * layout.expert_tensor + (2 * shape.ffn if cuda else 0)
    return 2 * shape.hidden + shape.experts_per_token * copy // _shards(layout)


def _stage_parameters(shape: ModelShape, layout: Layout) -> tuple[int, int]:
    """Parameters of the first or last stage on one rank, without and of the experts; norms and routers are whole."""
    layers = shape.layers // layout.pipeline
    # One stage: embedding and output layer, which may be one. Several: either end has one of the two, or its copy.
    embeddings = shape.embedding_parameters * (2 if layout.pipeline == 1 and not shape.tied else 1)
    whole, experts = shape.whole_parameters, shape.expert_parameters
    split = layers * (shape.layer_parameters - whole - experts) + embeddings
    dense = split // layout.tensor + layers * whole + shape.hidden
    return dense, layers * experts // (layout.expert * layout.expert_tensor)


def _in_flight(work: Workload, layout: Layout, stage: int) -> float:
    """Micro-batches whose activations a stage keeps at once: 1F1B or interleaved (arXiv 2104.04473, 2.2)."""
    mini_batch = work.mini_batch_questions * work.group * work.full_length
    behind = layout.pipeline - stage
    if layout.virtual > 1:
        chunks = 2 * (behind - 1) + (layout.virtual - 1) * layout.pipeline + 1
        return min(chunks / layout.virtual, micro_batches(work, layout, mini_batch))
    return min(behind, micro_batches(work, layout, mini_batch))


def _saved_by_layer(shape: ModelShape, layout: Layout, itemsize: int, cuda: bool, mask: int) -> int:
    """Bytes per token that autograd keeps for one layer. itemsize: bytes per number. mask: mask elements per token."""
    query, kv, tensor = shape.query_width, shape.kv_width, layout.tensor
    # Queries, keys and values before and after rope, attention's output before and after packing, its log-sum-exp.
    attention = itemsize * (4 * query + 3 * kv) + 4 * shape.heads
    if layout.context > 1:  # the projections go; the gathered keys and values of each of a sequence's two pieces stay
        attention = itemsize * (3 * query + (2 * layout.context + 1) * kv + mask * tensor) + 4 * shape.heads
    if layout.recompute == "selective":  # attention's inputs stay, its results go
        attention -= itemsize * query + 4 * shape.heads
    # SwiGLU: gate and up together, and their product; without the one kernel on CUDA silu(gate) too.
    swiglu = itemsize * (3 if cuda else 4) * shape.ffn
    mlp = _experts(shape, layout, itemsize, swiglu) if shape.experts else swiglu // tensor
    split = (attention + _head_norms(shape, layout, itemsize, cuda)) // tensor
    return 2 * _norm(shape, layout, itemsize, cuda) + split + mlp


def _experts(shape: ModelShape, layout: Layout, itemsize: int, swiglu: int) -> int:
    """Bytes per token that autograd keeps for a layer's router and experts, if all experts get equally many tokens: the
    router's logits, probabilities and weights, and for each copy of a token the experts' input, what SwiGLU keeps
    (swiglu bytes of a whole expert) and its product times the token's weight. The ranks that share an expert have the
    same copies."""
    router = 4 * max(itemsize, 4) * shape.experts
    copy = itemsize * shape.hidden * layout.expert_tensor + swiglu + itemsize * shape.ffn
    return (router + shape.experts_per_token * copy) // _shards(layout)


def _head_norms(shape: ModelShape, layout: Layout, itemsize: int, cuda: bool) -> int:
    """Bytes per token that the norms of queries and keys, if any, keep besides the projections: on CUDA contiguous
    copies of their inputs; else the inputs in float32 at least (queries copied, keys as projected) and the normalised
    inputs."""
    if not shape.architecture.qk_norm:
        return 0
    width = shape.query_width + shape.kv_width
    if cuda:
        return itemsize * width
    if itemsize < 4:
        return 2 * 4 * width
    projections = itemsize * (width + shape.kv_width) if layout.context > 1 else 0  # they stay, for the keys
    return itemsize * (width + shape.query_width) + projections


def _norm(shape: ModelShape, layout: Layout, itemsize: int, cuda: bool) -> int:
    """Bytes per token that a norm keeps: input and output; without the fused CUDA kernel torch computes in float32 at
    least, and keeps the normalised input too."""
    saved = 2 * itemsize if cuda else 2 * max(itemsize, 4) + itemsize
    return saved * shape.hidden // _shards(layout)


def _shards(layout: Layout) -> int:
    """Ranks that share the tokens outside a layer's tensor-parallel parts."""
    return layout.tensor if layout.sequence_parallel else 1
