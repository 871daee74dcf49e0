"""Hugging Face directories in and out: config -> megatron model, safetensors -> shards, shards -> named tensors.

mbridge knows the names and the layouts; here is what it lacks (the local spec's names, transformers 5, rope from
transformers, any per-parameter tensor under those names). Opens safetensors and JSON only; nothing is unpickled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from mbridge.models.llama import LLaMABridge
from mbridge.models.qwen2 import Qwen2Bridge
from mbridge.models.qwen3 import Qwen3Bridge
from megatron.core import parallel_state
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from torch import Tensor

from nemo_disco.models.hf_config import FAMILIES, read_hf_config
from nemo_disco.policy.layers import layer_spec
from nemo_disco.policy.model import PolicyModel
from nemo_disco.runtime.errors import UserError

# The local spec keeps norms as modules of their own; mbridge names them as Transformer Engine fuses them.
_FUSED_NAMES = {
    ".input_layernorm.weight": ".self_attention.linear_qkv.layer_norm_weight",
    ".pre_mlp_layernorm.weight": ".mlp.linear_fc1.layer_norm_weight",
}


class _LocalSpec:
    """What each bridge needs on top of mbridge 0.15.1, as a mix-in before it."""

    _DIRECT_MAPPING: dict[str, str]

    def __init__(self, hf_config: Any, dtype: torch.dtype, options: dict[str, Any]) -> None:
        self.megatron_options = options
        tensor_size = parallel_state.get_tensor_model_parallel_world_size()
        super().__init__(hf_config, dtype=dtype, make_vocab_size_divisible_by=tensor_size)  # type: ignore[call-arg]
        self.vocab_size = hf_config.vocab_size
        self.padded_vocab_size = math.ceil(hf_config.vocab_size / tensor_size) * tensor_size

    def _adjust_mapping_for_shared_weights(self) -> None:
        # Upstream edits a dict of the class, and one tied model would change every later untied one.
        self._DIRECT_MAPPING = dict(self._DIRECT_MAPPING)
        if self.hf_config.tie_word_embeddings:  # type: ignore[attr-defined]
            self._DIRECT_MAPPING["output_layer.weight"] = "model.embed_tokens.weight"

    def _weight_name_mapping_mcore_to_hf(self, name: str) -> list[str]:
        for local, fused in _FUSED_NAMES.items():
            name = name.replace(local, fused)
        return super()._weight_name_mapping_mcore_to_hf(name)  # type: ignore[misc, no-any-return]

    def _build_config(self) -> Any:
        hf = self.hf_config  # type: ignore[attr-defined]
        family = FAMILIES[hf.model_type]
        head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
        return self._build_base_config(  # type: ignore[attr-defined]
            add_qkv_bias=family.qkv_bias,
            kv_channels=head_dim,
            qk_layernorm=family.qk_norm,
            **self.megatron_options,
        )


class _Qwen2(_LocalSpec, Qwen2Bridge):  # type: ignore[misc]
    pass


class _Qwen3(_LocalSpec, Qwen3Bridge):  # type: ignore[misc]
    pass


class _Llama(_LocalSpec, LLaMABridge):  # type: ignore[misc]
    """Mistral too: the same network, where no window slides."""


_BRIDGES: dict[str, type] = {"qwen2": _Qwen2, "qwen3": _Qwen3, "llama": _Llama, "mistral": _Llama}


def load_hf_config(path: str | Path, trust_remote_code: bool = False) -> Any:
    """The transformers config of a local directory.

    Raises UserError as read_hf_config does, and for what transformers itself refuses.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    read_hf_config(path)
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=trust_remote_code)
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}/config.json: transformers refuses it: {' '.join(str(error).split())}") from error
    return config


@dataclass(frozen=True)
class _Entry:
    """One megatron parameter of the whole model: who owns it, and how its shards lie."""

    stage: int
    chunk: int
    local_name: str
    name: str
    shape: tuple[int, ...]
    tensor_model_parallel: bool
    partition_dim: int


def _plain(p: Tensor) -> Tensor:
    """A parameter as an ordinary tensor: under model.fp8_param_gather it is one of Transformer Engine's own kinds."""
    tensor: Tensor = dequantize_fp8_tensor(p) if is_float8tensor(p) else p
    return tensor.detach()


class HuggingFaceModel:
    """This rank's chunks of a megatron model, and their tensors under Hugging Face names."""

    def __init__(
        self,
        hf_config: Any,
        dtype: torch.dtype,
        options: dict[str, Any],
        transformer_engine: bool = False,
        vocabulary: int | None = None,
    ) -> None:
        """hf_config: of a local directory. options: TransformerConfig fields. vocabulary: rows of the output that are
        tokens (null: all). Weights are not initialised."""
        self.hf_config, self.transformer_engine = hf_config, transformer_engine
        self.vocabulary = hf_config.vocab_size if vocabulary is None else vocabulary
        self.bridge: Any = _BRIDGES[hf_config.model_type](hf_config, dtype, options)
        stages = parallel_state.get_virtual_pipeline_model_parallel_world_size()
        self.chunks = [self._build_chunk(stage) for stage in (range(stages) if stages else [None])]
        self._entries = self._all_entries()

    def _build_chunk(self, vp_stage: int | None) -> PolicyModel:
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        edge = {"ignore_virtual": vp_stage is None, "vp_stage": vp_stage}
        return PolicyModel(
            true_vocab_size=self.vocabulary,
            inv_freq=LlamaRotaryEmbedding(self.hf_config).inv_freq,
            config=self.bridge.config,
            transformer_layer_spec=layer_spec(self.bridge.config, self.transformer_engine, vp_stage),
            vocab_size=self.bridge.padded_vocab_size,
            max_sequence_length=self.hf_config.max_position_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(**edge),
            post_process=parallel_state.is_pipeline_last_stage(**edge),
            share_embeddings_and_output_weights=self.hf_config.tie_word_embeddings,
            vp_stage=vp_stage,
        )

    def _all_entries(self) -> list[_Entry]:
        stage = parallel_state.get_pipeline_model_parallel_rank()
        mine = []
        for index, chunk in enumerate(self.chunks):
            names = self.bridge._weight_name_mapping_mcore_local_to_global(chunk)
            for local_name, p in chunk.named_parameters():
                if names[local_name] == "output_layer.weight" and self.hf_config.tie_word_embeddings:
                    continue  # the last stage's copy of the embedding
                parallel = bool(getattr(p, "tensor_model_parallel", False))
                where = (stage, index, local_name, names[local_name], tuple(p.shape))
                mine.append(_Entry(*where, parallel, getattr(p, "partition_dim", -1)))
        stages: list[list[_Entry]] = [[]] * parallel_state.get_pipeline_model_parallel_world_size()
        dist.all_gather_object(stages, mine, group=parallel_state.get_pipeline_model_parallel_group())
        return [entry for entries in stages for entry in entries]

    def load(self, read: Callable[[str], Tensor]) -> None:
        """Fill every parameter from `read(name)`, the full tensor of a Hugging Face name."""
        rank = parallel_state.get_tensor_model_parallel_rank()
        size = parallel_state.get_tensor_model_parallel_world_size()
        for chunk in self.chunks:
            names = self.bridge._weight_name_mapping_mcore_local_to_global(chunk)
            for local_name, p in chunk.named_parameters():
                name = names[local_name]
                tensors = [read(hf) for hf in self.bridge._weight_name_mapping_mcore_to_hf(name)]
                whole = self.bridge._weight_to_mcore_format(name, tensors)
                shard = self.bridge._weight_split_across_tp(name, whole, p, size)[rank]
                with torch.no_grad():
                    p.copy_(shard)
                if hasattr(p, "_high_precision_init_val"):
                    # Of an FP8 parameter Transformer Engine keeps what it began as, and the optimizer starts from that.
                    p._high_precision_init_val = shard.to(dtype=torch.bfloat16, device="cpu")

    def names(self) -> list[str]:
        """The Hugging Face names of all tensors, in the order of named_tensors."""
        return [name for entry in self._entries for name in self.bridge._weight_name_mapping_mcore_to_hf(entry.name)]

    def named_tensors(self, of: Callable[[Tensor], Tensor] = _plain) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the model under its Hugging Face name, whole, on every rank, one megatron parameter at a
        time (so one parameter is the memory it needs). `of`: what to take of a parameter (itself, or its gradient).

        A collective: every rank of the model must run the iterator to its end.
        """
        tensor_group = parallel_state.get_tensor_model_parallel_group()
        pipeline_group = parallel_state.get_pipeline_model_parallel_group()
        stage = parallel_state.get_pipeline_model_parallel_rank()
        parameters = [dict(chunk.named_parameters()) for chunk in self.chunks]
        for entry in self._entries:
            tensor = of(parameters[entry.chunk][entry.local_name]) if entry.stage == stage else None
            if pipeline_group.size() > 1:
                tensor = _broadcast(tensor, entry, pipeline_group)
            assert tensor is not None
            if entry.tensor_model_parallel and tensor_group.size() > 1:
                shards = [torch.empty_like(tensor) for _ in range(tensor_group.size())]
                dist.all_gather(shards, tensor.contiguous(), group=tensor_group)
                tensor = self.bridge._weight_merge_across_tp(entry.name, shards, entry)
            yield from zip(*self.bridge._weight_to_hf_format(entry.name, tensor), strict=True)


def _broadcast(tensor: Tensor | None, entry: _Entry, group: Any) -> Tensor:
    source = dist.get_global_rank(group, entry.stage)
    kind: list[Any] = [None if tensor is None else tensor.dtype]
    dist.broadcast_object_list(kind, src=source, group=group)
    if tensor is None:
        tensor = torch.empty(entry.shape, dtype=kind[0], device=torch.cuda.current_device())
    tensor = tensor.contiguous()
    dist.broadcast(tensor, src=source, group=group)
    return tensor
