"""The shape of one model: its architecture and sizes, the names and shapes of its weights, and counts of parameters.

Reads one JSON file; must not import torch or transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from nemo_disco.models.architecture import ARCHITECTURES, EMBEDDING, FINAL_NORM, OUTPUT, Architecture, Sizes, Weight
from nemo_disco.models.directory import explain
from nemo_disco.models.hf_config import head_dim, read_hf_config, ropeless_layers, windowed_layers

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ModelWeight:
    """A weight of one model, whole: not cut by tensor parallelism.

    layer, expert: from 0; None: the weight is no layer's, or no expert's. key: megatron-core's name in a checkpoint,
    which stacks the layers, and in them the experts; row: its place there; rows: how many there are. local_key: the
    name in its own layers, where it differs; grouped_key: where one module computes all experts. parts: name and shape
    of each Hugging Face tensor. split: as in Weight. blocks: rows of what it consists of, the parts or, if it has one
    part that is fused, the blocks of that; groups: how many groups of rows alternate between the blocks.
    """

    layer: int | None
    expert: int | None
    key: str
    local_key: str
    grouped_key: str
    row: tuple[int, ...]
    rows: tuple[int, ...]
    parts: tuple[tuple[str, Shape], ...]
    split: int | None
    blocks: tuple[int, ...]
    groups: int

    @property
    def shape(self) -> Shape:
        """Shape of the megatron-core tensor."""
        return (sum(shape[0] for _, shape in self.parts), *self.parts[0][1][1:])

    def full_name(self, key: str) -> str:
        """megatron-core's name of the parameter in the whole model, from one of the keys."""
        name = key if self.layer is None else key.replace("decoder.layers.", f"decoder.layers.{self.layer}.")
        return name.replace("{expert}", str(self.expert))


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder: `head_dim` numbers per head, `max_positions` tokens, `ffn` the width of the MLP.

    experts: of each layer, of which a token goes through experts_per_token, each `ffn` wide; 0: layers have an MLP.
    window: how many tokens a token sees, itself included, in the layers that `windowed` marks; None: in no layer.
    ropeless: marks the layers without rope; empty: none.
    """

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    architecture: Architecture
    max_positions: int
    norm_eps: float = 1e-6
    experts: int = 0
    experts_per_token: int = 0
    window: int | None = None
    windowed: tuple[bool, ...] = ()
    ropeless: tuple[bool, ...] = ()

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of the keys, and of the values."""
        return self.kv_heads * self.head_dim

    def weights(self) -> Iterator[ModelWeight]:
        """Every weight, once, in the order of a forward pass; a tied output layer is the embedding."""
        yield self._weight(EMBEDDING)
        for layer in range(self.layers):
            for weight in self.architecture.layer.values():
                for expert in range(self.experts) if weight.expert else [None]:
                    yield self._weight(weight, layer, expert)
        yield self._weight(FINAL_NORM)
        if not self.tied:
            yield self._weight(OUTPUT)

    def tensors(self) -> dict[str, Shape]:
        """Name and shape of every Hugging Face tensor, without a tied output layer."""
        return dict(part for weight in self.weights() for part in weight.parts)

    def modules_with_fp8_state(self) -> Iterator[tuple[str, int, int]]:
        """(name, layer, layers) of Transformer Engine's modules with FP8 state: linear layers, attention and norms."""
        modules = [weight.name.rpartition(".")[0] for weight in self.architecture.layer.values()]
        for module in dict.fromkeys([*modules, "self_attention.core_attention"]):
            yield from ((f"decoder.layers.{module}", layer, self.layers) for layer in range(self.layers))
        yield FINAL_NORM.name.rpartition(".")[0], 0, 1

    def megatron_sizes(self) -> dict[str, int | float]:
        """The sizes by the names of megatron-core's TransformerConfig, which NeMo's configurations share."""
        return {
            "num_layers": self.layers,
            "hidden_size": self.hidden,
            "ffn_hidden_size": self.ffn,
            "num_attention_heads": self.heads,
            "num_query_groups": self.kv_heads,
            "kv_channels": self.head_dim,
            "add_qkv_bias": self.architecture.qkv_bias,
            "layernorm_epsilon": self.norm_eps,
        }

    def megatron_experts(self) -> dict[str, Any]:
        """The properties of the experts, by the names of megatron-core's TransformerConfig; empty without experts."""
        if not self.experts:
            return {}
        return {
            "num_moe_experts": self.experts,
            "moe_router_topk": self.experts_per_token,
            "moe_ffn_hidden_size": self.ffn,
        }

    def megatron_layers(self) -> dict[str, Any]:
        """The properties that differ between layers, by the names of megatron-core's TransformerConfig."""
        ropeless = [int(without) for without in self.ropeless] or None
        if self.window is None:
            return {"window_size": None, "no_rope_freq": ropeless}
        windowed = [int(on) for on in self.windowed]
        return {"window_size": (self.window - 1, 0), "window_attn_skip_freq": windowed, "no_rope_freq": ropeless}

    def _weight(self, weight: Weight, layer: int | None = None, expert: int | None = None) -> ModelWeight:
        megatron_prefix, hf_prefix = ("", "") if layer is None else ("decoder.layers.", f"model.layers.{layer}.")
        names = [hf_prefix + part.replace("{expert}", str(expert)) for part in weight.parts]
        shapes = [self._shape(sizes) for sizes in weight.sizes]
        blocks = tuple(shape[0] for shape in shapes)
        if weight.fused:
            shapes = [(sum(blocks), *shapes[0][1:])]
        stacks = [(n, size) for n, size in ((layer, self.layers), (expert, self.experts)) if n is not None]
        local_name = weight.local_name or weight.name
        return ModelWeight(
            layer,
            expert,
            key=megatron_prefix + weight.name,
            local_key=megatron_prefix + local_name,
            grouped_key=megatron_prefix + (weight.grouped_name or local_name),
            row=tuple(number for number, _ in stacks),
            rows=tuple(size for _, size in stacks),
            parts=tuple(zip(names, shapes, strict=True)),
            split=weight.split,
            blocks=blocks,
            groups=1 if weight.groups is None else getattr(self, weight.groups),
        )

    def _shape(self, sizes: Sizes) -> Shape:
        return tuple(getattr(self, size) for size in sizes)

    def identity(self, hf_config: Any) -> dict[str, Any]:
        """The model in a checkpoint's record, as plain JSON. hf_config: transformers' config.

        What a record of an earlier version does not have is None for the networks that it could be of.
        """
        kind = ("model_type", "vocab_size", "tie_word_embeddings", "rope_parameters")
        activation = self.architecture.activation
        return (
            {name: getattr(hf_config, name) for name in kind}
            | self.megatron_sizes()
            | {
                "window": self.window,
                "windowed": list(self.windowed) or None,
                "ropeless": list(self.ropeless) or None,
                "activation": None if activation == "silu" else activation,
                **self.megatron_experts(),
                **({"normalised_routing": self.architecture.normalised_routing} if self.experts else {}),
            }
        )

    # --- numbers of parameters ---

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer."""
        return self._count(self.architecture.layer.values())

    @property
    def whole_parameters(self) -> int:
        """Parameters of one layer that are whole on every tensor-parallel rank: norms, some biases and routers."""
        return self._count(weight for weight in self.architecture.layer.values() if weight.split is None)

    @property
    def expert_parameters(self) -> int:
        """Parameters of all experts of one layer; 0 without experts."""
        return self._count(weight for weight in self.architecture.layer.values() if weight.expert)

    @property
    def matrix_parameters(self) -> int:
        """Parameters of one layer's matrices that multiply a token: no biases, no norms, only its own experts."""
        matrices = [weight for weight in self.architecture.layer.values() if len(weight.sizes[0]) == 2]
        return self._count(matrices, experts=self.experts_per_token)

    def _count(self, weights: Iterable[Weight], experts: int | None = None) -> int:
        """Parameters of a layer's weights. experts: so many of a weight that every expert has; None: all."""
        copies = self.experts if experts is None else experts
        return sum((copies if w.expert else 1) * prod(self._shape(sizes)) for w in weights for sizes in w.sizes)

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the embedding; an output layer that is not tied has as many."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """All parameters."""
        embeddings = self.embedding_parameters * (1 if self.tied else 2)
        return self.layers * self.layer_parameters + embeddings + self.hidden

    @property
    def active_parameters(self) -> int:
        """The parameters that a token goes through: of the experts only its own."""
        if not self.experts:
            return self.parameters
        idle = self.expert_parameters * (self.experts - self.experts_per_token) // self.experts
        return self.parameters - self.layers * idle


# Published shapes of the papers' models and of larger ones of their family, so that `plan` works without their files.
# NAMES_BY_SIZE: their names by size (32b).
_DISTILL: dict[str, Any] = {"tied": False, "max_positions": 131072}
_QWEN2, _LLAMA = ({**_DISTILL, "architecture": ARCHITECTURES[name]} for name in ("qwen2", "llama"))
_QWEN3_8B = ModelShape(
    36, 4096, 12288, 32, 8, 128, 151936, tied=False, architecture=ARCHITECTURES["qwen3"], max_positions=40960
)
_QWEN3_MOE: dict[str, Any] = {
    "tied": False,
    "architecture": ARCHITECTURES["qwen3_moe"],
    "max_positions": 40960,
    "experts": 128,
    "experts_per_token": 8,
}
_MIXTRAL: dict[str, Any] = {
    "tied": False,
    "architecture": ARCHITECTURES["mixtral"],
    "max_positions": 32768,
    "experts": 8,
    "experts_per_token": 2,
}
PUBLISHED = {
    "DeepSeek-R1-Distill-Qwen-1.5B": ModelShape(28, 1536, 8960, 12, 2, 128, 151936, **_QWEN2),
    "DeepSeek-R1-Distill-Qwen-7B": ModelShape(28, 3584, 18944, 28, 4, 128, 152064, **_QWEN2),
    "DeepSeek-R1-Distill-Llama-8B": ModelShape(32, 4096, 14336, 32, 8, 128, 128256, **_LLAMA),
    "DeepSeek-R1-Distill-Qwen-32B": ModelShape(64, 5120, 27648, 40, 8, 128, 152064, **_QWEN2),
    "DeepSeek-R1-Distill-Llama-70B": ModelShape(80, 8192, 28672, 64, 8, 128, 128256, **_LLAMA),
    "Qwen3-8B": _QWEN3_8B,
    "DeepSeek-R1-0528-Qwen3-8B": replace(_QWEN3_8B, max_positions=131072),
    "Qwen3-30B-A3B": ModelShape(48, 2048, 768, 32, 4, 128, 151936, **_QWEN3_MOE),
    "Qwen3-235B-A22B": ModelShape(94, 4096, 1536, 64, 4, 128, 151936, **_QWEN3_MOE),
    "Mixtral-8x7B": ModelShape(32, 4096, 14336, 32, 8, 128, 32000, **_MIXTRAL),
}
_SIZE = re.compile(r"-(\d[\d.x]*b)", re.IGNORECASE)
NAMES_BY_SIZE: dict[str, str] = {}
for _name in PUBLISHED:  # of two models of one size, the paper's
    NAMES_BY_SIZE.setdefault(_SIZE.findall(_name)[0].lower(), _name)


def published_name(shape: ModelShape) -> str | None:
    """The name in PUBLISHED of the model that has this architecture, number of layers and hidden size, if any."""
    sizes = (shape.architecture, shape.layers, shape.hidden)
    return next((name for name, s in PUBLISHED.items() if (s.architecture, s.layers, s.hidden) == sizes), None)


def find_shape(path: str) -> tuple[ModelShape | None, str]:
    """The shape of the model at `path`, or the published shape of a name or size, or None; and a line that says which.

    Raises UserError for a damaged directory.
    """
    try:
        exists = Path(path).exists()
    except OSError:
        exists = True  # read_shape says why it cannot be read
    if exists:
        return read_shape(path), f"Model: {path}."
    missing = explain(Path(path))
    name = NAMES_BY_SIZE.get(path.lower(), Path(path).name)
    if (shape := PUBLISHED.get(name)) is not None:
        return shape, f"Model: the published shape of {name}{'' if path.lower() in NAMES_BY_SIZE else f'; {missing}'}."
    sizes = ", ".join(NAMES_BY_SIZE)
    return None, f"Model: {missing}. So there is no estimate; known without files: model.path={sizes}."


def read_shape(path: str | Path) -> ModelShape:
    """The shape of the model in a Hugging Face directory. Raises UserError as read_hf_config does."""
    return model_shape(read_hf_config(path))


def model_shape(config: Mapping[str, Any]) -> ModelShape:
    """The shape of the model that has this config, as read_hf_config returns it."""
    architecture = ARCHITECTURES[config["model_type"]]
    experts = architecture.experts
    windowed, ropeless = windowed_layers(config), ropeless_layers(config)
    return ModelShape(
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        ffn=config["intermediate_size" if experts is None else experts.width],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=head_dim(config),
        vocab=config["vocab_size"],
        tied=config["tie_word_embeddings"],
        architecture=architecture.chosen(config),
        max_positions=config["max_position_embeddings"],
        norm_eps=config["rms_norm_eps"],
        experts=0 if experts is None else config[experts.count[0]],
        experts_per_token=0 if experts is None else config["num_experts_per_tok"],
        window=config["sliding_window"] if any(windowed) else None,
        windowed=windowed if any(windowed) else (),
        ropeless=ropeless if any(ropeless) else (),
    )
