"""Tiny Hugging Face models of the real architectures with random weights, and random rollouts, for tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from nemo_disco.config.schema import ModelConfig
from nemo_disco.data.rollouts import Rollouts
from nemo_disco.generation.engine import Response

VOCABULARY = 130  # not a multiple of 4, so that it is padded at TP 4
# The model families that the README lists, each with tied and with untied embeddings.
FAMILIES = [
    f"{name}-{tying}"
    for name in ("qwen2", "qwen3", "llama", "mistral", "smollm3", "phi3", "olmo2", "qwen3_moe", "mixtral")
    for tying in ("tied", "untied")
]
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONG_ROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 128,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + 0.5 * i for i in range(8)],
}
# Of heads of 8 numbers, 6 are rotated.
PARTIAL_ROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.3],
    "long_factor": [2.0, 2.5, 3.0],
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
# Networks that a config.json chooses within a family: windows, biases, activations and ropes.
VARIANTS: dict[str, dict[str, Any]] = {
    "mistral-window": {"sliding_window": 11, "hidden_act": "gelu", "rope_parameters": YARN},
    "smollm3-window": {"use_sliding_window": True, "sliding_window": 9, "no_rope_layers": [1, 0, 1, 0]},
    "qwen2-window": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2},
    "qwen3-biases": {"attention_bias": True, "hidden_act": "relu", "rope_parameters": LONG_ROPE},
    "llama-biases": {
        "attention_bias": True,
        "mlp_bias": True,
        "hidden_act": "gelu_pytorch_tanh",
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    },
}


def save_model(directory: Path, architecture: str, *, tied: bool, seed: int = 0, **changes: Any) -> Path:
    """Save a 4-layer model with grouped queries; changes: of its config. Returns the directory.

    Its weights are large, so that its predictions are far from uniform. Weights of norms and biases are 0.5 to 1.5, so
    that leaving one out changes the log-probs.
    """
    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 256,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": 1,
    } | changes
    torch.manual_seed(seed)
    if architecture == "llama":
        model = LlamaForCausalLM(LlamaConfig(**({"rope_parameters": LLAMA3_ROPE} | shape)))
    else:
        defaults = {
            "qwen2": {},
            "qwen3": {"head_dim": 16},
            "mistral": {"sliding_window": None},
            "smollm3": {"pad_token_id": None},
            "phi3": {"pad_token_id": None, "original_max_position_embeddings": 128, "rope_parameters": PARTIAL_ROPE},
            "olmo2": {"pad_token_id": None},
            "qwen3_moe": {
                "head_dim": 16,
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 48,
                "norm_topk_prob": tied,
            },
            "mixtral": {"num_local_experts": 4},
        }[architecture]
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **(defaults | shape)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.1)
            else:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(directory)
    return directory


def save_family(directory: Path, family: str, **changes: Any) -> Path:
    """Save a model of one of FAMILIES or VARIANTS, as `save_model` does. Returns the directory."""
    architecture, tying = family.split("-")
    return save_model(directory, architecture, tied=tying == "tied", **(VARIANTS.get(family, {}) | changes))


def load_transformers_model(directory: Path, dtype: torch.dtype = torch.float64) -> Any:
    """transformers' model of the directory, which computes everything in `dtype`.

    Its own norms and routers compute in float32 even in a float64 model, and are replaced.
    """

    def rms_norm(self: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon)

    def router(self: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits = torch.nn.functional.linear(x.reshape(-1, self.hidden_dim), self.weight)
        weights, chosen = logits.softmax(-1).topk(self.top_k, dim=-1)
        if getattr(self, "norm_topk_prob", True):
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights, chosen

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, experts_implementation="eager")
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = rms_norm.__get__(module)
        if type(module).__name__.endswith("TopKRouter"):
            module.forward = router.__get__(module)
    return model


# By family: where the experts are in a file, and the names there of an expert's gate, up and down.
EXPERTS = {
    "qwen3_moe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
    "mixtral": ("block_sparse_moe", ("w1", "w3", "w2")),
}


def by_file_name(tensors: dict[str, torch.Tensor], architecture: str) -> dict[str, torch.Tensor]:
    """transformers' tensors under the names in a model's file, where each expert has matrices of its own."""
    if architecture not in EXPERTS:
        return tensors
    place, (gate, up, down) = EXPERTS[architecture]
    result = {}
    for name, tensor in tensors.items():
        layer, experts, kind = name.partition("mlp.experts.")
        if not experts:
            result[name.replace("mlp.gate.", f"{place}.gate.")] = tensor
            continue
        for expert, matrix in enumerate(tensor):
            parts = {gate: matrix.chunk(2)[0], up: matrix.chunk(2)[1]} if kind == "gate_up_proj" else {down: matrix}
            result |= {f"{layer}{place}.experts.{expert}.{part}.weight": value for part, value in parts.items()}
    return result


def model_config(path: Path, **changes: Any) -> ModelConfig:
    """The section `model` of a configuration: one rank, Adam at a constant rate. changes: of its keys."""
    settings: dict[str, Any] = {
        "path": str(path),
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "context_parallel_size": 1,
        "expert_model_parallel_size": 1,
        "expert_tensor_parallel_size": None,
        "moe_router_replay": "trainer",
        "sequence_parallel": False,
        "activations_checkpoint_granularity": None,
        "token_budget": 256,
        "trust_remote_code": False,
        "transformer_engine": None,
        "fp8": None,
        "fp8_param_gather": False,
        "apply_rope_fusion": False,
        "bias_activation_fusion": False,
        "optim": {
            "name": "adam",
            "lr": 1e-3,
            "weight_decay": 0.0,
            "betas": (0.9, 0.999),
            "eps": 1e-8,
            "moments_dtype": "float32",
            "offload": False,
            "sched": {"name": "constant", "warmup_steps": 0, "min_lr": 0.0},
        },
    }
    return ModelConfig.model_validate(settings | changes)


def random_rollouts(questions: int = 4, group: int = 4, seed: int = 0, longest: int = 40) -> Rollouts:
    """Rollouts with random prompts, responses, some of them empty, and rewards, 0 or 1.

    questions: their number; group: responses to each; longest: a response has fewer tokens than this.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    def tokens(count: int) -> list[int]:
        return [draw(0, VOCABULARY) for _ in range(count)]

    prompts = [p for _ in range(questions) for p in [tokens(draw(1, 20))] * group]
    responses = [tokens(draw(0, longest)) for _ in prompts]
    rollouts = Rollouts.pack(
        prompts,
        responses,
        [[0.0] * len(r) for r in responses],
        [i // group for i in range(len(prompts))],
        [False] * len(prompts),
    )
    return rollouts.with_rewards([float(draw(0, 2)) for _ in prompts])


def to_rollouts(prompts: Sequence[Sequence[int]], responses: Sequence[Response]) -> Rollouts:
    """An engine's responses to `prompts` as rollouts; each prompt counts as a question of its own."""
    return Rollouts.pack(
        prompts,
        [r.tokens for r in responses],
        [r.log_probs for r in responses],
        range(len(responses)),
        [r.finish_reason == "length" for r in responses],
        routes=[r.routes for r in responses if r.routes is not None] or None,
    )


def limit_vocabulary(rollouts: Rollouts, vocabulary: int) -> Rollouts:
    """The rollouts with every token id taken modulo `vocabulary`."""
    return replace(rollouts, tokens=rollouts.tokens % vocabulary)


def transformers_distributions(
    model: Any, rollouts: Rollouts, temperature: float, vocabulary: int | None = None
) -> torch.Tensor:
    """[T, V] the log-probs of all tokens at the response tokens' places by transformers' model, differentiable; one
    sequence at a time, unpacked.

    vocabulary: the number V of tokens, where the model has more rows in its output layer.
    """
    pieces = []
    for i in range(len(rollouts)):
        ids = torch.cat([rollouts.prompt(i), rollouts.response(i)])[None]
        log_probs = (model(ids).logits[0, :, :vocabulary] / temperature).log_softmax(-1)
        pieces.append(log_probs[int(rollouts.prompt_lengths[i]) - 1 : -1])
    return torch.cat(pieces)


def transformers_log_probs(
    model: Any, rollouts: Rollouts, temperature: float, vocabulary: int | None = None
) -> torch.Tensor:
    """[T] the response tokens' log-probs, as transformers_distributions gives them."""
    tokens = torch.cat([rollouts.response(i) for i in range(len(rollouts))])
    return transformers_distributions(model, rollouts, temperature, vocabulary).gather(1, tokens[:, None])[:, 0]
