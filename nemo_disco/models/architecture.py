"""Description of each architecture (a model_type of Hugging Face), as data: its modules, weights, rope and activation.

A new architecture of the same building blocks is one entry of ARCHITECTURES; nothing outside this directory knows a
model_type. Must not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Sizes = tuple[str, ...]


@dataclass(frozen=True)
class Weight:
    """One tensor of megatron-core and the Hugging Face tensors that it consists of.

    name: megatron-core's; parts: Hugging Face's names. Those of a layer's weights come after `decoder.layers.N.` and
    `model.layers.N.`. sizes: the shape of each part, as attributes of ModelShape.
    split: the dimension of each part that tensor parallelism splits; None: every rank has the whole tensor.
    fused: the parts are one Hugging Face tensor, in which they follow one another; parts is then its name alone.
    groups: an attribute of ModelShape: how many groups of rows the tensor has, each with its rows of every part in
    turn; None: one group, so that the parts follow one another.
    local_name: megatron-core's own name where its norms are modules of their own, not fused into the linear layer.
    expert: every expert of the layer has such a tensor; `{expert}` in local_name, grouped_name and parts is its number.
    grouped_name: megatron-core's name where one module computes all experts.
    """

    name: str
    parts: tuple[str, ...]
    sizes: tuple[Sizes, ...]
    split: int | None = None
    groups: str | None = None
    local_name: str | None = None
    fused: bool = False
    expert: bool = False
    grouped_name: str | None = None


def _norm(
    name: str, part: str, size: str = "hidden", *, split: int | None = None, local_name: str | None = None
) -> Weight:
    return Weight(name, (f"{part}.weight",), ((size,),), split=split, local_name=local_name)


def _bias(module: str, *parts: str, size: str, split: int | None = None) -> Weight:
    return Weight(f"{module}.bias", parts, ((size,),) * len(parts), split=split)


def _qkv(kind: str, *columns: str) -> Weight:
    parts = tuple(f"self_attn.{part}_proj.{kind}" for part in "qkv")
    sizes = tuple((rows, *columns) for rows in ("query_width", "kv_width", "kv_width"))
    return Weight(f"self_attention.linear_qkv.{kind}", parts, sizes, split=0, groups="kv_heads")


EMBEDDING = Weight("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), (("vocab", "hidden"),), split=0)
FINAL_NORM = _norm("decoder.final_layernorm.weight", "model.norm")
OUTPUT = Weight("output_layer.weight", ("lm_head.weight",), (("vocab", "hidden"),), split=0)
# The building blocks of a layer, in the order of a forward pass.
LAYER = {
    "attention_norm": _norm(
        "self_attention.linear_qkv.layer_norm_weight", "input_layernorm", local_name="input_layernorm.weight"
    ),
    "qkv": _qkv("weight", "hidden"),
    "qkv_bias": _qkv("bias"),
    "query_norm": _norm("self_attention.q_layernorm.weight", "self_attn.q_norm", "head_dim"),
    "key_norm": _norm("self_attention.k_layernorm.weight", "self_attn.k_norm", "head_dim"),
    "projection": Weight(
        "self_attention.linear_proj.weight", ("self_attn.o_proj.weight",), (("hidden", "query_width"),), split=1
    ),
    "projection_bias": _bias("self_attention.linear_proj", "self_attn.o_proj.bias", size="hidden"),
    "attention_output_norm": _norm("attention_output_norm.weight", "post_attention_layernorm"),
    "mlp_norm": _norm(
        "mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm", local_name="pre_mlp_layernorm.weight"
    ),
    "gate_up": Weight(
        "mlp.linear_fc1.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight"), (("ffn", "hidden"),) * 2, split=0
    ),
    "gate_up_bias": _bias("mlp.linear_fc1", "mlp.gate_proj.bias", "mlp.up_proj.bias", size="ffn", split=0),
    "down": Weight("mlp.linear_fc2.weight", ("mlp.down_proj.weight",), (("hidden", "ffn"),), split=1),
    "down_bias": _bias("mlp.linear_fc2", "mlp.down_proj.bias", size="hidden"),
    "mlp_output_norm": _norm("mlp_output_norm.weight", "post_feedforward_layernorm"),
}
# The norms before attention and the MLP, and those at their output.
NORMS = frozenset({"attention_norm", "mlp_norm", "attention_output_norm", "mlp_output_norm"})
# One tensor of queries, keys and values, and one of gates and ups.
FUSED = {
    "qkv": replace(LAYER["qkv"], parts=("self_attn.qkv_proj.weight",), fused=True),
    "gate_up": replace(LAYER["gate_up"], parts=("mlp.gate_up_proj.weight",), fused=True),
}
# Norms of the queries of all heads together, and of the keys.
WIDE_QK_NORM = {
    "query_norm": _norm("self_attention.q_layernorm.weight", "self_attn.q_norm", "query_width", split=0),
    "key_norm": _norm("self_attention.k_layernorm.weight", "self_attn.k_norm", "kv_width", split=0),
}


@dataclass(frozen=True)
class Experts:
    """Names of what a family has in place of an MLP: a router, and experts of which it chooses a few for each token.

    count: the field of config.json with their number, under all its names. width: the field with the width of one.
    router, gate, up, down: the modules' names in Hugging Face's files, with {expert} for the number of one.
    """

    count: tuple[str, ...]
    width: str
    router: str
    gate: str
    up: str
    down: str

    @property
    def weights(self) -> dict[str, Weight]:
        """Their weights by role, as in LAYER. In a checkpoint megatron-core stacks experts, as it stacks layers."""
        wide, narrow = ("ffn", "hidden"), ("hidden", "ffn")
        return {
            "mlp_norm": _norm("pre_mlp_layernorm.weight", "post_attention_layernorm"),
            "router": Weight("mlp.router.weight", (f"{self.router}.weight",), (("experts", "hidden"),)),
            "gate_up": self._expert("linear_fc1", 0, wide, self.gate, self.up),
            "down": self._expert("linear_fc2", 1, narrow, self.down),
        }

    @staticmethod
    def _expert(module: str, split: int, sizes: Sizes, *parts: str) -> Weight:
        return Weight(
            f"mlp.experts.experts.{module}.weight",
            tuple(f"{part}.weight" for part in parts),
            (sizes,) * len(parts),
            split=split,
            local_name=f"mlp.experts.local_experts.{{expert}}.{module}.weight",
            expert=True,
            grouped_name=f"mlp.experts.{module}.weight{{expert}}",
        )


@dataclass(frozen=True)
class Architecture:
    """Properties that all networks of one model_type share, and those that a config.json chooses.

    norms: where a layer has norms, by their role in LAYER: before attention and the MLP, or at their output.
    weights: weights that are made of others than in LAYER, by their role.
    switches: a field of config.json, and the properties that are true where it is true. activation: a hidden_act.
    absent: values of the fields that a config.json leaves out; rope_theta: the base of rope's angles if it is left out.
    null_head_dim: a config.json may say `"head_dim": null`, for hidden_size / num_attention_heads.
    window: where its sliding_window counts; `switch`: only if use_sliding_window is true; `unbuilt`: the same, and then
    the network is not built here.
    partial_rope: a config.json may rotate only the first part of each head, by partial_rotary_factor.
    ropeless_layers: some layers, by no_rope_layers or no_rope_layer_interval, have no rope.
    experts: the names of the experts that its layers have in place of an MLP; None: an MLP. normalised_routing: the
    weights of a token's chosen experts are divided by their sum.
    published_code: the names in auto_map of code beside published models that computes the network built here.
    nemo: NeMo 2.0's name of the model, None if it has none; nemo_configs: NeMo's configuration class for each type of
    rope that it has.
    """

    model_type: str
    nemo: str | None
    nemo_configs: Mapping[str, str] = field(hash=False)
    qkv_bias: bool = False
    projection_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    norms: tuple[str, ...] = ("attention_norm", "mlp_norm")
    weights: Mapping[str, Weight] = field(default_factory=dict, hash=False)
    switches: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)
    norm: str = "RMSNorm"
    activation: str = "silu"
    absent: Mapping[str, Any] = field(default_factory=dict, hash=False)
    rope_theta: float = 10000.0
    null_head_dim: bool = True
    window: Literal["never", "always", "switch", "unbuilt"] = "never"
    partial_rope: bool = False
    ropeless_layers: bool = False
    published_code: frozenset[str] = frozenset()
    experts: Experts | None = field(default=None, hash=False)
    normalised_routing: bool = True

    @property
    def layer(self) -> dict[str, Weight]:
        """The weights of a layer by their role, in the order of a forward pass."""
        has = {
            "qkv_bias": self.qkv_bias,
            "projection_bias": self.projection_bias,
            "query_norm": self.qk_norm,
            "key_norm": self.qk_norm,
            "gate_up_bias": self.mlp_bias,
            "down_bias": self.mlp_bias,
            **{role: role in self.norms for role in LAYER if role in NORMS},
        }
        roles = {role: self.weights.get(role, weight) for role, weight in LAYER.items() if has.get(role, True)}
        if self.experts is None:
            return roles
        mlp = ("mlp_norm", "gate_up", "down")
        return {role: weight for role, weight in roles.items() if role not in mlp} | self.experts.weights

    @property
    def wide_qk_norm(self) -> bool:
        """True if the norms of queries and of keys are over all heads together."""
        return self.qk_norm and self.layer["query_norm"].split is not None

    def chosen(self, config: Mapping[str, Any]) -> Architecture:
        """The architecture of the network that has this config: its switches and its activation are set."""
        values: dict[str, Any] = {"activation": ACTIVATIONS[config.get("hidden_act", self.activation)]}
        for key, names in self.switches.items():
            values |= dict.fromkeys(names, bool(config.get(key)))
        return replace(self, **values)


# Known families that are not built, and why.
UNBUILT = {
    "deepseek_v3": "it has latent attention, which neither the packed attention nor the cache of decoding computes; "
    "megatron-core 0.16 computes it on packed sequences with Transformer Engine alone",
    "gemma3": "it reads images, and its layers have two ropes, where megatron-core 0.16 has one",
    "gemma3_text": "its layers have two ropes, where megatron-core 0.16 has one",
    "gpt_oss": "its attention has sinks, which torch's kernels do not compute, and megatron-core 0.16 on packed "
    "sequences with Transformer Engine alone",
}
# hidden_act of config.json -> the activation of the MLP's gate.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
_ATTENTION_BIAS = {"attention_bias": ("qkv_bias", "projection_bias")}
_WINDOW = {"sliding_window": 4096}
_QWEN: dict[str, Any] = {"null_head_dim": False, "window": "switch"}
ARCHITECTURES = {
    a.model_type: a
    for a in (
        Architecture(
            "llama",
            "Llama",
            {"default": "LlamaConfig", "llama3": "Llama31Config"},
            switches={**_ATTENTION_BIAS, "mlp_bias": ("mlp_bias",)},
        ),
        Architecture(
            "mistral",
            "Mistral",
            {"default": "MistralConfig7B"},  # NeMo has no Mistral without a size
            absent={"num_key_value_heads": 8, **_WINDOW},
            window="always",
        ),
        Architecture(
            "qwen2",
            "Qwen2",
            {"default": "Qwen2Config"},
            qkv_bias=True,
            absent={"num_key_value_heads": 32, **_WINDOW},
            **_QWEN,
        ),
        Architecture(
            "qwen3",
            "Qwen3",
            {"default": "Qwen3Config"},
            qk_norm=True,
            switches=_ATTENTION_BIAS,
            absent={"num_key_value_heads": 32, "head_dim": 128, **_WINDOW},
            **_QWEN,
        ),
        Architecture(
            "smollm3",
            None,
            {},
            switches={**_ATTENTION_BIAS, "mlp_bias": ("mlp_bias",)},
            absent={"num_key_value_heads": 4, "tie_word_embeddings": True},
            rope_theta=2000000.0,
            null_head_dim=False,
            window="switch",
            ropeless_layers=True,
        ),
        Architecture(
            "phi3",
            None,
            {},
            weights=FUSED,
            absent={"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
            window="always",
            partial_rope=True,
            published_code=frozenset({"configuration_phi3.Phi3Config", "modeling_phi3.Phi3ForCausalLM"}),
        ),
        Architecture(
            "olmo2",
            None,
            {},
            qk_norm=True,
            norms=("attention_output_norm", "mlp_output_norm"),
            weights=WIDE_QK_NORM,
            switches=_ATTENTION_BIAS,
            absent={"rms_norm_eps": 1e-5},
        ),
        Architecture(
            "qwen3_moe",
            None,
            {},
            qk_norm=True,
            switches={**_ATTENTION_BIAS, "norm_topk_prob": ("normalised_routing",)},
            absent={
                "num_key_value_heads": 4,
                "num_experts": 128,
                "num_experts_per_tok": 8,
                "moe_intermediate_size": 768,
            },
            null_head_dim=False,
            window="unbuilt",
            experts=Experts(
                count=("num_experts", "num_local_experts"),
                width="moe_intermediate_size",
                router="mlp.gate",
                gate="mlp.experts.{expert}.gate_proj",
                up="mlp.experts.{expert}.up_proj",
                down="mlp.experts.{expert}.down_proj",
            ),
        ),
        Architecture(
            "mixtral",
            None,
            {},
            absent={
                "num_key_value_heads": 8,
                "rms_norm_eps": 1e-5,
                "num_local_experts": 8,
                "num_experts_per_tok": 2,
            },
            rope_theta=1e6,
            window="always",
            experts=Experts(
                count=("num_local_experts",),
                width="intermediate_size",
                router="block_sparse_moe.gate",
                gate="block_sparse_moe.experts.{expert}.w1",
                up="block_sparse_moe.experts.{expert}.w3",
                down="block_sparse_moe.experts.{expert}.w2",
            ),
        ),
    )
}
