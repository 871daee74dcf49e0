"""Estimate of a step's seconds, by part: FLOPs with attention, decoding bound by memory bandwidth, communication.

Pure arithmetic on the assumptions that `ASSUMED` states; no figure here was measured on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from nemo_disco.estimate.flops import DATASHEET, TRAINING
from nemo_disco.estimate.memory import BYTES, Layout, Workload, cache_per_response, micro_batches, responses_per_rank
from nemo_disco.models.shape import ModelShape

# H100 SXM by its data sheet: dense FLOP/s at bf16 and TF32; bytes/s of memory, NVLink one way, a 400 Gb/s card.
PEAK, PEAK_32 = DATASHEET["H100"], DATASHEET["H100"] / 2
HBM, NVLINK, NETWORK = 3.35e12, 450e9, 50e9
# Assumed shares of these peaks that are reached.
MATRICES, ATTENTION, BANDWIDTH, LINKS = 0.4, 0.25, 0.6, 0.7
LAUNCH = 100e-6  # seconds per layer and decoded token to launch the embedded engine's kernels
COLLECTIVE = 20e-6  # seconds per small all-reduce or all-to-all within a node
MEAN_LENGTH = 1 / 3  # of the longest prompt and response
SQUARES = 1.6  # mean of squared lengths over the squared mean: exponential, cut at three times the mean

ASSUMED = (
    f"an H100 SXM per rank, {MATRICES:.0%} of its peak in matrix products, {ATTENTION:.0%} in attention, "
    f"{BANDWIDTH:.0%} of its memory's bandwidth in decoding, {LINKS:.0%} of NVLink (450 GB/s) within a node and of "
    f"400 Gb/s per GPU between nodes, no communication hidden, {1e6 * LAUNCH:.0f} us per layer and token to launch the "
    f"embedded engine's kernels; responses of a third of the limit in mean, spread exponentially, one at the limit"
)


@dataclass(frozen=True)
class Seconds:
    """Seconds of one step by part; `communication` is contained in the others."""

    generate: float
    log_probs: float
    pass1: float
    train: float
    refit: float
    communication: float

    @property
    def step(self) -> float:
        return self.generate + self.log_probs + self.pass1 + self.train + self.refit


def step_seconds(work: Workload, shape: ModelShape, layout: Layout, cache_bytes: float, gpus_per_node: int) -> Seconds:
    """Seconds of one step. cache_bytes: a rank's memory for keys and values.

    As megatron numbers ranks, those of a TP group are neighbours, then those of CP, DP and PP.
    """
    mini_batches = work.questions // work.mini_batch_questions
    mean = MEAN_LENGTH * work.full_length
    tokens = work.questions * work.group * mean
    matrices, attention = _forward(work, shape, layout, tokens, mean)
    exchange = _exchange(work, shape, layout, tokens, gpus_per_node)
    # The pipeline fills and drains once per mini-batch.
    count = micro_batches(work, layout, tokens / mini_batches)
    bubble = 1 + (layout.pipeline - 1) / (layout.virtual * count)
    one_pass = (matrices + attention + exchange) * bubble
    recomputed = {None: 0.0, "selective": attention, "full": matrices + attention + exchange}[layout.recompute]
    reduce = mini_batches * _gradients(work, shape, layout, gpus_per_node)
    # Backward's communication is forward's, and SP's inputs gathered once more.
    backward = (TRAINING - 1) * (matrices + attention) + 1.5 * exchange + recomputed
    train = one_pass + backward * bubble + reduce
    passes = 1 + work.reference
    pass1 = one_pass * (mini_batches - 1) / mini_batches if work.two_passes else 0.0
    generate, decoding = _generate(work, shape, layout, mean, cache_bytes, gpus_per_node)
    communication = exchange * (passes + 1 + 1.5 + (layout.recompute == "full")) + reduce + decoding
    return Seconds(
        generate=generate,
        log_probs=passes * one_pass,
        pass1=pass1,
        train=train,
        refit=_refit(work, shape, layout, gpus_per_node),
        communication=communication + exchange * (pass1 / one_pass),
    )


def _forward(work: Workload, shape: ModelShape, layout: Layout, tokens: float, mean: float) -> tuple[float, float]:
    """Seconds of a rank's share of a forward pass over all tokens: matrix products, with 2 FLOPs per weight, and causal
    attention, with 2 n query_width FLOPs per layer for each of n tokens, at most 4 w in a layer whose window has w
    tokens."""
    peak = (PEAK if work.precision == "bf16" else PEAK_32) * layout.ranks
    matrices = 2 * tokens * (shape.layers * shape.matrix_parameters + shape.embedding_parameters)
    span, windowed = SQUARES * mean, sum(shape.windowed)
    spans = (shape.layers - windowed) * span + windowed * min(span, 2 * (shape.window or span))
    attention = 2 * tokens * spans * shape.query_width
    return matrices / (MATRICES * peak), attention / (ATTENTION * peak)


def _exchange(work: Workload, shape: ModelShape, layout: Layout, tokens: float, gpus_per_node: int) -> float:
    """Seconds of TP and CP communication in a rank's forward pass over all its tokens."""
    itemsize, layers = BYTES[work.precision][0], shape.layers // layout.pipeline
    local = tokens / layout.data / layout.context
    # Attention and MLP: an all-reduce each (under SP a gather and a scatter), twice the hidden states. Experts: none.
    tensor = (
        (2 if shape.experts else 4)
        * shape.hidden
        * (layout.tensor - 1)
        / layout.tensor
        / _link(layout.tensor, gpus_per_node)
    )
    experts = expert_exchange(work, shape, layout, tokens) / _link(layout.expert * layout.expert_tensor, gpus_per_node)
    # The keys and values of the other context-parallel ranks.
    ranks = layout.tensor * layout.context
    context = 2 * shape.kv_width / layout.tensor * (layout.context - 1) / _link(ranks, gpus_per_node)
    return local * layers * itemsize * (tensor + context) + experts


def expert_exchange(work: Workload, shape: ModelShape, layout: Layout, tokens: float) -> float:
    """Bytes that a rank sends to others in a forward pass over all its tokens: each copy of a token to its expert and
    back; the ranks that share an expert all need it."""
    local = tokens / layout.data / layout.context / (layout.tensor if layout.sequence_parallel else 1)
    return local * _copies(work, shape, layout) * shape.layers / layout.pipeline


def _copies(work: Workload, shape: ModelShape, layout: Layout) -> float:
    """Bytes that a rank sends to others for one of its tokens in one layer with experts."""
    split = layout.expert * layout.expert_tensor
    copies = 2 * shape.experts_per_token * layout.expert_tensor * (split - 1) / split
    return copies * shape.hidden * BYTES[work.precision][0]


def _gradients(work: Workload, shape: ModelShape, layout: Layout, gpus_per_node: int) -> float:
    """Seconds per mini-batch to reduce the gradients and to gather the new weights."""
    weight, gradient, _ = BYTES[work.precision]
    experts = shape.layers * shape.expert_parameters
    parts = [(shape.parameters - experts, layout.tensor, layout.shares)]
    parts += [(experts, layout.expert * layout.expert_tensor, layout.expert_shares)] * bool(experts)
    seconds = 0.0
    for parameters, split, shares in parts:
        volume = parameters / split / layout.pipeline * (weight + gradient) * (shares - 1) / shares
        seconds += volume / _link(split * shares, gpus_per_node)
    return seconds


def _generate(
    work: Workload, shape: ModelShape, layout: Layout, mean: float, cache_bytes: float, gpus_per_node: int
) -> tuple[float, float]:
    """Seconds to sample a rank's responses, in as many waves as the cache needs, and those of its communication.

    Decoding a token reads the stage's weights once for all rows, and each row's keys and values; pipeline stages take
    turns. Prefill is a forward pass.
    """
    itemsize = BYTES[work.precision][0]
    rows = responses_per_rank(work, layout)
    waves = -(-rows // max(1, int(cache_bytes // cache_per_response(work, shape, layout))))
    limit, prompt = work.response_limit, work.prompt_limit * MEAN_LENGTH
    experts = shape.layers * shape.expert_parameters
    weights = itemsize * (shape.parameters - experts) / layout.tensor / (HBM * BANDWIDTH)
    weights += itemsize * experts / (layout.expert * layout.expert_tensor) / (HBM * BANDWIDTH)
    # A response's cache is read once at every length from the prompt's to its own.
    tokens_read = rows * SQUARES * mean**2 / 2
    bytes_per_token = cache_per_response(work, shape, layout) * layout.pipeline / work.full_length
    cache = tokens_read * bytes_per_token / (HBM * BANDWIDTH)
    # While it samples, every tensor-parallel rank sends all rows to the experts.
    active = shape.experts_per_token * experts / max(1, shape.experts)
    multiplied = (shape.active_parameters - active) / layout.tensor + active
    decoded = 2 * rows * mean * multiplied / (PEAK * MATRICES)
    start = shape.layers * LAUNCH if work.engine == "megatron" else 0.0
    # A layer's all-reduces of attention and the MLP, or of attention and the experts' two all-to-alls.
    split = layout.expert * layout.expert_tensor
    collectives = (layout.tensor > 1) * (1 if shape.experts else 2) + (2 if shape.experts and split > 1 else 0)
    waiting = waves * limit * shape.layers * collectives * COLLECTIVE
    waiting += rows * mean * shape.layers * _copies(work, shape, layout) / _link(split, gpus_per_node)
    prefill = 2 * rows * prompt * multiplied / (PEAK * MATRICES)
    steps = waves * limit
    # Bound by bandwidth or by arithmetic.
    reading = max(steps * weights + cache, decoded)
    return reading + prefill + steps * start + waiting, waiting


def _refit(work: Workload, shape: ModelShape, layout: Layout, gpus_per_node: int) -> float:
    """Seconds to send the weights to an external engine; the embedded one reads the policy's."""
    if work.engine == "megatron":
        return 0.0
    weights = BYTES[work.precision][0] * shape.parameters
    return weights / _link(layout.ranks, gpus_per_node)


def _link(ranks: int, gpus_per_node: int) -> float:
    """Bytes/s of a link among this many neighbouring ranks."""
    return LINKS * (NVLINK if ranks <= gpus_per_node else NETWORK)
