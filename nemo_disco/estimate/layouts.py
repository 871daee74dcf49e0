"""Layouts in which a cluster can run a configuration, the memory and time of each, and the recommended one.

Pure arithmetic on the estimates of memory.py and timing.py; prints nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from math import gcd

from nemo_disco.config.consistency import check_layout, divisors, format_numbers, longest_sequence
from nemo_disco.config.schema import ModelConfig, RunConfig
from nemo_disco.estimate.memory import Layout, Memory, Workload, cache_per_response, estimate_memory
from nemo_disco.estimate.timing import Seconds, step_seconds
from nemo_disco.models.shape import ModelShape
from nemo_disco.runtime.errors import UserError

USABLE = 0.9  # of a GPU's memory: the rest goes to the context, NCCL and the allocator
CACHE = 0.6  # of the free memory, for keys and values (generation/megatron/engine.py)
_NEAR = 1.05  # a layout up to this much slower than the fastest is preferred if it cuts the model less
_RECOMPUTE = (None, "selective", "full")


@dataclass(frozen=True)
class Candidate:
    """A layout on GPUs of `gpu_bytes`, with its memory and the seconds of a step."""

    layout: Layout
    memory: Memory
    seconds: Seconds
    gpu_bytes: float
    cache_bytes: float  # memory for keys and values
    longest_cache: int  # bytes of the keys and values of one sequence of full length

    @property
    def waves(self) -> int:
        """Rounds in which a step's responses are sampled; 0 if not even one response fits."""
        rows = self.memory.kv_cache // self.longest_cache
        at_once = int(max(0.0, self.cache_bytes) // self.longest_cache)
        return -(-rows // at_once) if at_once else 0

    @property
    def fits(self) -> bool:
        return self.memory.training <= USABLE * self.gpu_bytes and self.waves > 0


def assess(work: Workload, shape: ModelShape, layout: Layout, gpu_bytes: float, gpus_per_node: int) -> Candidate:
    """Estimate the memory and time of one layout."""
    memory = estimate_memory(work, shape, layout)
    cache_bytes = CACHE * (USABLE * gpu_bytes - memory.sampling(offload=work.offload))
    seconds = step_seconds(work, shape, layout, cache_bytes, gpus_per_node)
    return Candidate(layout, memory, seconds, gpu_bytes, cache_bytes, cache_per_response(work, shape, layout))


def candidates(config: RunConfig, work: Workload, shape: ModelShape, gpu_bytes: float) -> list[Candidate]:
    """Every legal layout of the configuration's processes, each with the least recomputation that fits, else full;
    the fastest first, those that do not fit last."""
    gpus_per_node, world_size = config.trainer.devices, config.trainer.devices * config.trainer.num_nodes
    layouts = []
    for layout in _legal_layouts(config, shape, world_size, gpus_per_node):
        variants = [replace(layout, recompute=recompute) for recompute in _RECOMPUTE]
        options = [assess(work, shape, variant, gpu_bytes, gpus_per_node) for variant in variants]
        layouts.append(next((c for c in options if c.fits), options[-1]))
    return sorted(layouts, key=lambda c: (not c.fits, c.seconds.step if c.fits else c.memory.training))


def recommend(layouts: list[Candidate]) -> Candidate | None:
    """The fitting layout that cuts the model least among those near the fastest; None if none fits."""
    fitting = [c for c in layouts if c.fits]
    if not fitting:
        return None
    near = [c for c in fitting if c.seconds.step <= _NEAR * fitting[0].seconds.step]
    return min(near, key=lambda c: (c.layout.model_ranks, c.layout.pipeline, c.layout.virtual, c.seconds.step))


def check_shape(config: RunConfig, shape: ModelShape) -> None:
    """Raises UserError if the run's or engine's layout does not divide the model, or lengths exceed its positions."""
    model = config.model
    tensor, pipeline = model.tensor_model_parallel_size, model.pipeline_model_parallel_size
    for heads, count in (("attention heads", shape.heads), ("key-value heads", shape.kv_heads)):
        if count % tensor:
            raise UserError(
                f"model.tensor_model_parallel_size={tensor} does not divide the model's {count} {heads}; "
                f"would work: {format_numbers(divisors(gcd(shape.heads, shape.kv_heads)))}"
            )
    stages = pipeline * (model.virtual_pipeline_model_parallel_size or 1)
    if shape.layers % stages:
        key = "model.pipeline_model_parallel_size"
        key += " x virtual_pipeline_model_parallel_size" if stages != pipeline else ""
        raise UserError(
            f"{key}={stages} does not divide the model's {shape.layers} layers; "
            f"would work: {format_numbers(divisors(shape.layers))}"
        )
    _check_experts(model, shape)
    split = config.generation.tensor_parallel_size
    if gcd(shape.heads, shape.kv_heads) % split:
        raise UserError(
            f"generation.tensor_parallel_size={split} does not divide the model's {shape.heads} attention heads and "
            f"{shape.kv_heads} key-value heads; "
            f"would work: {format_numbers(divisors(gcd(shape.heads, shape.kv_heads)))}"
        )
    longest, sum_of = longest_sequence(config)
    if longest > shape.max_positions:
        raise UserError(f"{sum_of} tokens, but the model has {shape.max_positions} positions; lower one of them")


def _check_experts(model: ModelConfig, shape: ModelShape) -> None:
    """Raises UserError if the layout does not suit the model's experts, or it has none and the layout splits them."""
    size, split = model.expert_model_parallel_size, model.expert_tensor_parallel_size
    if not shape.experts:
        for key, value in (("expert_model_parallel_size", size), ("expert_tensor_parallel_size", split)):
            if value not in (None, 1):
                raise UserError(f"model.{key}={value}: this model has no experts; leave it out")
        if model.moe_router_replay == "engine":
            raise UserError("model.moe_router_replay=engine: this model has no experts; leave it out")
        return
    if shape.experts % size:
        raise UserError(
            f"model.expert_model_parallel_size={size} does not divide the model's {shape.experts} experts; "
            f"would work: {format_numbers(divisors(shape.experts, size))}"
        )
    if split is not None and shape.ffn % split:
        raise UserError(
            f"model.expert_tensor_parallel_size={split} does not divide the width of an expert, {shape.ffn}"
        )
    if model.tensor_model_parallel_size > 1 and not model.sequence_parallel:
        raise UserError(
            f"model.tensor_model_parallel_size={model.tensor_model_parallel_size} with experts needs "
            "model.sequence_parallel=true: else every tensor-parallel rank would send the same tokens to them"
        )


def _legal_layouts(config: RunConfig, shape: ModelShape, world_size: int, gpus_per_node: int) -> Iterator[Layout]:
    """Layouts that pass a run's checks: TP within a node and with SP, CP up to 8, 1, 2 or 4 virtual stages, and
    whole experts."""
    sizes = [n for n in range(1, world_size + 1) if world_size % n == 0]
    expert_sizes = [n for n in sizes if shape.experts % n == 0] if shape.experts else [1]
    for tensor, pipeline, context, virtual, expert in product(sizes, sizes, sizes, (1, 2, 4), expert_sizes):
        if tensor > gpus_per_node or world_size % (tensor * pipeline * context) or context > 8:
            continue
        variant = _with_layout(config, tensor, pipeline, context, virtual, expert if shape.experts else None)
        try:
            check_layout(variant, world_size)
            check_shape(variant, shape)
        except UserError:
            continue
        yield Layout.from_config(variant.model, world_size)


def _with_layout(
    config: RunConfig, tensor: int, pipeline: int, context: int, virtual: int, expert: int | None
) -> RunConfig:
    """expert: ranks among which experts are split; None: the model has none."""
    changes = {
        "expert_model_parallel_size": expert or 1,
        "expert_tensor_parallel_size": None if expert is None else 1,
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": pipeline,
        "virtual_pipeline_model_parallel_size": virtual if virtual > 1 else None,
        "context_parallel_size": context,
        "sequence_parallel": tensor > 1,
    }
    return config.model_copy(update={"model": config.model.model_copy(update=changes)})
