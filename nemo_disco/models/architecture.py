"""The names and layouts of one model in both worlds, as a table: Qwen2, Qwen3, Llama, Mistral.

Pure: a Hugging Face config.json in, pairings out. Each pairing is one megatron tensor of one layer and the Hugging Face
tensors that it is made of.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from nemo_disco.models.hf_config import read_hf_config
from nemo_disco.models.shape import decoder_sizes

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Pairing:
    """key: megatron's, layer: its row where layers are stacked under one key (None: no layer's); shape: of that row.

    parts: (Hugging Face name, shape). kind: how the parts make the whole.
    """

    key: str
    layer: int | None
    shape: Shape
    parts: tuple[tuple[str, Shape], ...]
    kind: Literal["same", "stacked", "qkv"] = "same"


@dataclass(frozen=True)
class Architecture:
    """config: what read_hf_config returns; its sizes by the names of ModelShape."""

    config: dict[str, Any]
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    qkv_bias: bool
    qk_norm: bool

    def megatron_sizes(self) -> dict[str, int | bool]:
        """By the names of megatron-core's TransformerConfig, which NeMo's configurations share."""
        return {
            "num_layers": self.layers,
            "hidden_size": self.hidden,
            "ffn_hidden_size": self.ffn,
            "num_attention_heads": self.heads,
            "num_query_groups": self.kv_heads,
            "kv_channels": self.head_dim,
            "add_qkv_bias": self.qkv_bias,
        }

    def pairings(self) -> Iterator[Pairing]:
        """Every tensor of the model, once, in the order of a forward pass."""
        h, ffn, d = self.hidden, self.ffn, self.head_dim
        table = (self.vocab, h)
        yield Pairing("embedding.word_embeddings.weight", None, table, (("model.embed_tokens.weight", table),))
        for layer in range(self.layers):
            hf = f"model.layers.{layer}."

            def one(key: str, name: str, shape: Shape, layer: int = layer, hf: str = hf) -> Pairing:
                return Pairing(f"decoder.layers.{key}", layer, shape, ((hf + name, shape),))

            yield one("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight", (h,))
            yield self._qkv(layer, hf, "weight", (h,))
            if self.qkv_bias:
                yield self._qkv(layer, hf, "bias", ())
            if self.qk_norm:
                yield one("self_attention.q_layernorm.weight", "self_attn.q_norm.weight", (d,))
                yield one("self_attention.k_layernorm.weight", "self_attn.k_norm.weight", (d,))
            yield one("self_attention.linear_proj.weight", "self_attn.o_proj.weight", (h, self.heads * d))
            yield one("mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm.weight", (h,))
            gated = tuple((f"{hf}mlp.{name}_proj.weight", (ffn, h)) for name in ("gate", "up"))
            yield Pairing("decoder.layers.mlp.linear_fc1.weight", layer, (2 * ffn, h), gated, "stacked")
            yield one("mlp.linear_fc2.weight", "mlp.down_proj.weight", (h, ffn))
        yield Pairing("decoder.final_layernorm.weight", None, (h,), (("model.norm.weight", (h,)),))
        if not self.tied:
            yield Pairing("output_layer.weight", None, table, (("lm_head.weight", table),))

    def modules_with_state(self) -> Iterator[tuple[str, int, int]]:
        """(name, layer, layers) of what may hold FP8 state: Transformer Engine's linear layers, attention and norms."""
        names = ["self_attention.linear_qkv", "self_attention.core_attention", "self_attention.linear_proj"]
        names += ["mlp.linear_fc1", "mlp.linear_fc2"]
        if self.qk_norm:
            names += ["self_attention.q_layernorm", "self_attention.k_layernorm"]
        yield from ((f"decoder.layers.{name}", i, self.layers) for name in names for i in range(self.layers))
        yield "decoder.final_layernorm", 0, 1

    def join(self, pairing: Pairing, parts: list[Tensor]) -> Tensor:
        """The megatron tensor. Its memory, and for more than one part no more than that again."""
        if pairing.kind == "same":
            return parts[0]
        whole = torch.empty(pairing.shape, dtype=parts[0].dtype)
        for view, part in zip(self._views(pairing, whole), parts, strict=True):
            view.copy_(part.view(view.shape))
        return whole

    def split(self, pairing: Pairing, whole: Tensor) -> list[Tensor]:
        """The Hugging Face tensors, as views where that is possible."""
        if pairing.kind == "same":
            return [whole]
        views = self._views(pairing, whole)
        return [view.reshape(shape) for view, (_, shape) in zip(views, pairing.parts, strict=True)]

    def _qkv(self, layer: int, hf: str, what: str, columns: Shape) -> Pairing:
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        rows = (("q", queries), ("k", keys), ("v", keys))
        parts = tuple((f"{hf}self_attn.{name}_proj.{what}", (n, *columns)) for name, n in rows)
        shape = (queries + 2 * keys, *columns)
        return Pairing(f"decoder.layers.self_attention.linear_qkv.{what}", layer, shape, parts, "qkv")

    def _views(self, pairing: Pairing, whole: Tensor) -> list[Tensor]:
        """The parts inside the whole. megatron keeps each group's queries beside its key and its value."""
        if pairing.kind == "stacked":
            return list(whole.chunk(2))
        grouped = whole.view(self.kv_heads, -1, self.head_dim, *whole.shape[1:])
        share = self.heads // self.kv_heads
        return [grouped[:, :share], grouped[:, share : share + 1], grouped[:, share + 1 :]]


def read_architecture(directory: Path) -> Architecture:
    """Of a Hugging Face directory. Raises UserError as read_hf_config does."""
    config = read_hf_config(directory)
    return Architecture(config=config, **decoder_sizes(config))
