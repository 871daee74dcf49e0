"""This rank's part of the megatron network of a Hugging Face model, and its tensors under their Hugging Face names.

Names and layouts are those of nemo_disco.models; opens no files. A rank has some of the layers (pipeline stage,
virtual stage) and a shard of each weight (tensor parallelism).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from nemo_disco.data.packing import round_up
from nemo_disco.models.architecture import EMBEDDING, OUTPUT
from nemo_disco.models.rope import read_angles
from nemo_disco.models.shape import ModelShape, ModelWeight
from nemo_disco.models.weight_layout import shard, unshard
from nemo_disco.policy.layers import layer_spec
from nemo_disco.policy.model import PolicyModel
from nemo_disco.runtime.collectives import on_every_rank

_LAYER = re.compile(r"(?<=^decoder\.layers\.)\d+")
# The number of an expert in the name of its parameter: of a module of its own, or of one module for all experts.
_EXPERT = re.compile(r"(?<=\.experts\.local_experts\.)\d+|(?<=\.weight)\d+$")


@dataclass(frozen=True)
class _Entry:
    """One megatron parameter: its pipeline stage, the expert-parallel rank that has it (None: all have it), its chunk,
    name in the chunk, name in the model, and shape on a rank."""

    stage: int
    owner: int | None
    chunk: int
    local_name: str
    name: str
    shape: tuple[int, ...]


def _plain(p: Tensor) -> Tensor:
    """A parameter as an ordinary tensor: under model.fp8_param_gather it is of a type of Transformer Engine's."""
    tensor: Tensor = dequantize_fp8_tensor(p) if is_float8tensor(p) else p
    return tensor.detach()


class HuggingFaceModel:
    """This rank's chunks (one per virtual stage) of a megatron network, and their tensors under Hugging Face names."""

    def __init__(
        self,
        shape: ModelShape,
        hf_config: Any,
        config: TransformerConfig,
        transformer_engine: bool = False,
        vocabulary: int | None = None,
        longest: int = 0,
    ) -> None:
        """hf_config: transformers' config of the model. vocabulary: how many rows of the output are tokens (None: all).
        longest: tokens of the longest sequence, for read_angles. Weights are not initialised."""
        self.shape, self.config, self.transformer_engine = shape, config, transformer_engine
        self.vocabulary = shape.vocab if vocabulary is None else vocabulary
        self._angles = read_angles(hf_config, longest)
        self._weights = {w.full_name(key): w for w in shape.weights() for key in (w.key, w.local_key, w.grouped_key)}
        if shape.tied:  # the last pipeline stage has a copy of the embedding
            self._weights[OUTPUT.name] = self._weights[EMBEDDING.name]
        stages = parallel_state.get_virtual_pipeline_model_parallel_world_size()
        self.chunks = [self._build_chunk(stage) for stage in (range(stages) if stages else [None])]
        self._entries = self._all_entries()

    def _build_chunk(self, vp_stage: int | None) -> PolicyModel:
        edge = {"ignore_virtual": vp_stage is None, "vp_stage": vp_stage}
        return PolicyModel(
            true_vocab_size=self.vocabulary,
            angles=self._angles,
            config=self.config,
            transformer_layer_spec=layer_spec(self.config, self.shape.architecture, self.transformer_engine, vp_stage),
            vocab_size=round_up(self.shape.vocab, parallel_state.get_tensor_model_parallel_world_size()),
            max_sequence_length=self.shape.max_positions,
            pre_process=parallel_state.is_pipeline_first_stage(**edge),
            post_process=parallel_state.is_pipeline_last_stage(**edge),
            share_embeddings_and_output_weights=self.shape.tied,
            vp_stage=vp_stage,
        )

    def _all_entries(self) -> list[_Entry]:
        """The parameters of all pipeline stages, without a tied output layer. A collective."""
        stage = parallel_state.get_pipeline_model_parallel_rank()
        rank = parallel_state.get_expert_model_parallel_rank()
        owner = {name: None if weight.expert is None else rank for name, weight in self._weights.items()}
        mine = [
            _Entry(stage, owner[name], index, local_name, name, tuple(parameter.shape))
            for index, chunk in enumerate(self.chunks)
            for local_name, name, parameter in _parameters(chunk)
            if not (self.shape.tied and name == OUTPUT.name)
        ]
        experts = on_every_rank(lambda: mine, parallel_state.get_expert_model_parallel_group())
        order = {name: number for number, name in enumerate(self._weights)}
        ours = sorted({entry for entries in experts for entry in entries}, key=lambda entry: order[entry.name])
        stages = on_every_rank(lambda: ours, parallel_state.get_pipeline_model_parallel_group())
        return [entry for entries in stages for entry in entries]

    def load(self, read: Callable[[str], Tensor]) -> None:
        """Fill every parameter from `read(name)`, the full tensor of a Hugging Face name."""
        for _, name, parameter in (entry for chunk in self.chunks for entry in _parameters(chunk)):
            weight = self._weights[name]
            group = _tensor_group(weight)
            parts = [read(part) for part, _ in weight.parts]
            tensor = shard(weight, parts, group.rank(), group.size()).to(self.config.params_dtype)
            with torch.no_grad():
                parameter.copy_(tensor)
            if hasattr(parameter, "_high_precision_init_val"):
                # Transformer Engine keeps the value an FP8 parameter began with; the optimizer starts from that.
                parameter._high_precision_init_val = tensor.to("cpu", torch.bfloat16)

    def names(self) -> list[str]:
        """The Hugging Face names of all tensors, in the order of named_tensors."""
        return [name for entry in self._entries for name, _ in self._weights[entry.name].parts]

    def named_tensors(self, select: Callable[[Tensor], Tensor] = _plain) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the model under its Hugging Face name, whole, on every rank. Needs the memory of one megatron
        parameter. select: picks a tensor of each parameter, its values or its gradient.

        A collective: every rank of the model must run the iterator to its end.
        """
        pipeline_group = parallel_state.get_pipeline_model_parallel_group()
        expert_group = parallel_state.get_expert_model_parallel_group()
        parameters = [dict(chunk.named_parameters()) for chunk in self.chunks]
        dtype = select(next(self.chunks[0].parameters())).dtype
        for entry in self._entries:
            here = entry.stage == pipeline_group.rank()
            owned = here and entry.owner in (None, expert_group.rank())
            tensor = select(parameters[entry.chunk][entry.local_name]) if owned else None
            if here and entry.owner is not None and expert_group.size() > 1:
                tensor = _broadcast(tensor, entry.shape, dtype, expert_group, entry.owner)
            if pipeline_group.size() > 1:
                tensor = _broadcast(tensor, entry.shape, dtype, pipeline_group, entry.stage)
            assert tensor is not None
            weight = self._weights[entry.name]
            yield from unshard(weight, _gather(weight, tensor))


def _parameters(chunk: PolicyModel) -> Iterator[tuple[str, str, Tensor]]:
    """Name in the chunk, name in the whole model, and tensor of each parameter."""
    group = parallel_state.get_expert_model_parallel_group()
    first = group.rank() * (chunk.config.num_moe_experts or 0) // group.size()  # of this rank's experts
    for name, parameter in chunk.named_parameters():
        whole = _LAYER.sub(lambda m: str(chunk.decoder.layers[int(m[0])].layer_number - 1), name)
        yield name, _EXPERT.sub(lambda m: str(first + int(m[0])), whole), parameter


def _tensor_group(weight: ModelWeight) -> Any:
    """The group of ranks among which tensor parallelism splits the weight."""
    if weight.expert is None:
        return parallel_state.get_tensor_model_parallel_group()
    return parallel_state.get_expert_tensor_parallel_group()


def _gather(weight: ModelWeight, tensor: Tensor) -> list[Tensor]:
    """The shards of all tensor-parallel ranks, or the tensor alone if it is whole on each rank."""
    group = _tensor_group(weight)
    if weight.split is None or group.size() == 1:
        return [tensor]
    shards = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(shards, tensor.contiguous(), group=group)
    return shards


def _broadcast(tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, group: Any, rank: int) -> Tensor:
    """The tensor that one rank of the group has (None on the others), on all of them."""
    if tensor is None:
        tensor = torch.empty(shape, dtype=dtype, device=torch.cuda.current_device())
    tensor = tensor.contiguous()
    dist.broadcast(tensor, src=dist.get_global_rank(group, rank), group=group)
    return tensor
