"""Reader of config.json for every command, and the list of the fields that it may have.

A field is one that the network is built from, or one that does not change the network (with the reason, here); any
other is refused by name, since it may change the network. Reads one JSON file; must not import torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from nemo_disco.models.architecture import ACTIVATIONS, ARCHITECTURES, UNBUILT, Architecture
from nemo_disco.models.directory import explain
from nemo_disco.models.rope import read_rope
from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.saved_files import FileError, read_json

# Values of fields that a config.json leaves out, whatever its architecture.
_ABSENT = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False}
_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings",
)  # fmt: skip
_LARGEST_SIZE, _MOST_LAYERS = 2**31 - 1, 10_000  # beyond these transformers runs out of memory or never returns
_KINDS = ("full_attention", "sliding_attention")  # of a layer, without and with a sliding window
_DTYPES = ("float32", "bfloat16", "float16", "float64")
READ_FIELDS = frozenset(_SIZES) | {
    "model_type", "architectures", "auto_map", "head_dim", "rms_norm_eps", "tie_word_embeddings", "dtype",
    "torch_dtype", "rope_theta", "rope_scaling", "rope_parameters", "sliding_window", "use_sliding_window",
    "layer_types", "max_window_layers", "no_rope_layers", "no_rope_layer_interval", "partial_rotary_factor",
}  # fmt: skip

_HARMLESS = {
    "writer and purpose of the file": """_name_or_path name_or_path _commit_hash transformers_version tokenizer_class
        prefix model_max_length max_sequence_length is_llama_config is_qwen2_config is_decoder transformers.js_config
        unsloth_version unsloth_fixed""",
    "ids of special tokens: the tokenizer and the engine read them": """bos_token_id eos_token_id pad_token_id
        sep_token_id decoder_start_token_id forced_bos_token_id forced_eos_token_id""",
    "sampling: set by generation.* here": """max_length min_length max_new_tokens min_new_tokens do_sample
        early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p min_p typical_p
        repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
        num_return_sequences output_scores return_dict_in_generate remove_invalid_values
        exponential_decay_length_penalty suppress_tokens begin_suppress_tokens""",
    "initialization of new weights; losses and labels of other tasks": """initializer_range neftune_noise_alpha
        finetuning_task task_specific_params problem_type id2label label2id num_labels router_aux_loss_coef""",
    "outputs and kernels of a forward pass, which change no value": """use_cache return_dict output_hidden_states
        output_attentions tie_last_hidden_states torchscript use_bfloat16 tf_legacy_loss pretraining_tp
        attn_implementation _attn_implementation _attn_implementation_autoset _attn_implementation_internal
        _experts_implementation_internal experts_implementation _flash_attn_2_enabled gradient_checkpointing""",
}
HARMLESS = {name: reason for reason, names in _HARMLESS.items() for name in names.split()}

_UNQUANTIZED = "quantized weights are not read here: give the directory of the unquantized model (bf16)"
# Values of a field with which the network is the one built here, and a hint for any other value.
BUILT_VALUES: dict[str, tuple[tuple[Any, ...], str]] = {
    "hidden_act": (tuple(ACTIVATIONS), ""),
    "attention_dropout": ((0, None), "the old and the new log-probs must differ by the weights alone: set it to 0.0"),
    "embd_pdrop": ((0, None), "the old and the new log-probs must differ by the weights alone: set it to 0.0"),
    "resid_pdrop": ((0, None), "the old and the new log-probs must differ by the weights alone: set it to 0.0"),
    "lm_head_bias": ((False, None), ""),
    "full_attn_mod": ((1,), ""),
    "interpolate_factor": ((1,), ""),
    "rope_interleaved": ((False, None), ""),
    "use_mrope": ((False, None), ""),
    "quantization_config": ((None,), _UNQUANTIZED),
    "quantization": ((None,), _UNQUANTIZED),
    "compression_config": ((None,), _UNQUANTIZED),
    "decoder_sparse_step": ((1,), "all layers have experts, or none"),
    "mlp_only_layers": (([], None), "all layers have experts, or none"),
    "output_router_logits": ((False, None), "the auxiliary loss of the router is not computed: set it to false"),
    "router_jitter_noise": ((0, None), "the old and the new log-probs must differ by the weights alone: set it to 0.0"),
    "is_encoder_decoder": ((False,), ""),
    "add_cross_attention": ((False,), ""),
    "cross_attention_hidden_size": ((None,), ""),
    "tie_encoder_decoder": ((False,), ""),
    "chunk_size_feed_forward": ((0,), ""),
    "pruned_heads": (({}, None), ""),
}


def read_hf_config(directory: str | Path) -> dict[str, Any]:
    """The checked fields of a Hugging Face directory's config.json, under the names of both transformers 4 and 5.

    Fields that the network is built from and the file leaves out get transformers' values. Rope is in `rope_theta` and
    `rope_scaling` as well as in `rope_parameters`, the type of the weights in `torch_dtype` as well as in `dtype`.
    Raises UserError that names the field, or says what the directory is instead.
    """
    file = Path(directory) / "config.json"
    try:
        hint = explain(Path(directory))
    except OSError as error:
        raise UserError(
            f"{directory} cannot be read ({error.strerror}); give a Hugging Face model directory"
        ) from error
    if hint is not None:
        raise UserError(hint)
    try:
        config = read_json(file, dict[str, Any], links=True)
    except FileError as fault:
        raise UserError(f"{fault}; the model directory is damaged") from None
    try:
        return _check(config)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def load_hf_config(path: str | Path, trust_remote_code: bool = False) -> Any:
    """The transformers config of a local directory.

    Raises UserError as read_hf_config does, and for a config that transformers itself refuses.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    read_hf_config(path)
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=trust_remote_code)
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}/config.json: transformers refuses it: {' '.join(str(error).split())}") from error


def _check(config: dict[str, Any]) -> dict[str, Any]:
    """Check a config, and return it with the values of absent fields. Raises UserError if its network is not built."""
    kind = config.get("model_type")
    if isinstance(kind, str) and kind in UNBUILT:
        raise UserError(f"model_type {_text(kind)} is not built: {UNBUILT[kind]}")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        nearest = get_close_matches(str(kind), ARCHITECTURES, n=1)
        hint = f"; the nearest that is: {nearest[0]}" if nearest else ""
        raise UserError(f"model_type {_text(kind)} is not built; known: {', '.join(sorted(ARCHITECTURES))}{hint}")
    architecture = ARCHITECTURES[kind]
    _check_identity(config, kind)
    _check_fields(config, architecture)
    config = {**_ABSENT, **architecture.absent, **config, **_expert_count(config, architecture)}
    if config.get("num_key_value_heads") is None:
        config["num_key_value_heads"] = config.get("num_attention_heads")
    _check_sizes(config, architecture)
    _check_attention(config, architecture)
    _check_experts(config, architecture)
    return config | _spellings(config, architecture)


def _check_identity(config: dict[str, Any], kind: str) -> None:
    """Raises UserError unless the network is transformers' own decoder with a language-model head."""
    decoder = f"{kind.replace('_', '')}forcausallm"
    names = config.get("architectures") or [decoder]
    if not isinstance(names, list) or not all(str(name).lower() == decoder for name in names):
        raise UserError(
            f"architectures={_text(names)} is not built for model_type {kind!r}, only a decoder with a language-model "
            "head (...ForCausalLM)"
        )
    code = config.get("auto_map", {})
    known = ARCHITECTURES[kind].published_code
    if not isinstance(code, dict) or any(k != "AutoTokenizer" and str(v) not in known for k, v in code.items()):
        raise UserError(
            f"auto_map={_text(code)} names code of the model's own, and the network built here is transformers' "
            f"{kind}; remove the entry if the two are the same network"
        )


def _check_fields(config: dict[str, Any], architecture: Architecture) -> None:
    """Raises UserError for an unknown field, and for a value that makes another network than the one built here."""
    built = BUILT_VALUES | dict.fromkeys(("attention_bias", "mlp_bias"), ((False, None), ""))
    built |= {"attention_bias": ((True,), "")} if architecture.qkv_bias else {}
    built |= dict.fromkeys(architecture.switches, ((True, False), ""))
    known = (
        READ_FIELDS | HARMLESS.keys() | built.keys() | architecture.absent.keys() | set(_expert_fields(architecture))
    )
    unknown = [name for name in config if name not in known]
    if unknown:
        named = ", ".join(f"{_text(name, quote=False)}={_text(config[name])}" for name in unknown[:3])
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise UserError(
            f"{named}{more}: not a field that is known here, and it may change the network; remove it if it does not"
        )
    for name, (values, hint) in built.items():
        if name in config and not any(_same(config[name], value) for value in values):
            allowed = " or ".join(_text(value) for value in values)
            raise UserError(f"{name}={_text(config[name])} is not built, only {allowed}" + (f"; {hint}" * bool(hint)))


def _check_sizes(config: dict[str, Any], architecture: Architecture) -> None:
    """Raises UserError for sizes that are missing, not whole numbers or do not divide one another."""
    if missing := [name for name in _SIZES if config.get(name) is None]:
        raise UserError(f"{missing[0]} is missing; only decoders such as Qwen2 and Llama are built")
    null = config.get("head_dim") is None and (architecture.null_head_dim or "head_dim" not in config)
    for name in _SIZES if null else (*_SIZES, "head_dim"):
        limit = _MOST_LAYERS if name == "num_hidden_layers" else _LARGEST_SIZE
        if not _is_size(config[name], limit):
            raise UserError(f"{name}={_text(config[name])} is not a whole number of at least 1 and at most {limit:,}")
    heads, kv_heads, hidden = (config[n] for n in ("num_attention_heads", "num_key_value_heads", "hidden_size"))
    if heads % kv_heads:
        raise UserError(f"num_key_value_heads={kv_heads} does not divide num_attention_heads={heads}")
    if config.get("head_dim") is None and hidden % heads:
        raise UserError(f"num_attention_heads={heads} does not divide hidden_size={hidden}, and there is no head_dim")
    if head_dim(config) % 2:
        raise UserError(f"a head has {head_dim(config)} numbers, and rope rotates pairs of them")
    if not _is_number(config["rms_norm_eps"]) or config["rms_norm_eps"] <= 0:
        raise UserError(f"rms_norm_eps={_text(config['rms_norm_eps'])} is not a number above 0")
    if not isinstance(config["tie_word_embeddings"], bool):
        raise UserError(f"tie_word_embeddings={_text(config['tie_word_embeddings'])} is neither true nor false")


def head_dim(config: Mapping[str, Any]) -> int:
    """Numbers of a head, by the config, as read_hf_config returns it."""
    size: int = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return size


def _check_attention(config: dict[str, Any], architecture: Architecture) -> None:
    """Raises UserError for a sliding window that the architecture lacks, or that two fields contradict."""
    window, uses = config.get("sliding_window"), config.get("use_sliding_window")
    if uses not in (True, False, None):
        raise UserError(f"use_sliding_window={_text(uses)} is neither true nor false")
    if window is not None and not _is_size(window, _LARGEST_SIZE):
        raise UserError(f"sliding_window={_text(window)} is neither null nor a whole number of at least 1")
    if window is not None and architecture.window == "never":
        raise UserError(f"sliding_window={_text(window)} is not built: this model_type has none; set it to null")
    if uses and architecture.window == "unbuilt":
        raise UserError(
            "use_sliding_window=true is not built for this model_type; set it to false if it was not trained so"
        )
    if window is not None and architecture.window == "always" and uses is False:
        raise UserError(
            f"use_sliding_window=false and sliding_window={window}: transformers reads the second alone for this "
            "model_type; set sliding_window to null, or remove use_sliding_window"
        )
    first, layers = config.get("max_window_layers", 28), config["num_hidden_layers"]
    if architecture.window == "switch" and (not isinstance(first, int) or isinstance(first, bool) or first < 0):
        raise UserError(f"max_window_layers={_text(first)} is not a whole number of at least 0")
    _check_ropeless(config, architecture)
    kinds = config.get("layer_types")
    if kinds is not None and (
        not isinstance(kinds, list) or len(kinds) != layers or any(kind not in _KINDS for kind in kinds)
    ):
        raise UserError(
            f"layer_types={_text(kinds)} is not {' or '.join(map(repr, _KINDS))} for each of num_hidden_layers={layers}"
        )
    built = [_KINDS[on] for on in windowed_layers(config)]
    if kinds is not None and kinds != built:
        raise UserError(f"layer_types={_text(kinds)} contradicts sliding_window={_text(window)}")


def _expert_fields(architecture: Architecture) -> tuple[str, ...]:
    """The fields of config.json that describe the experts of an architecture."""
    experts = architecture.experts
    return () if experts is None else (*experts.count, experts.width, "num_experts_per_tok")


def _expert_count(config: Mapping[str, Any], architecture: Architecture) -> dict[str, Any]:
    """The number of experts under all its names, if a name is in the config. Raises UserError if they contradict."""
    names = () if architecture.experts is None else architecture.experts.count
    values = [config[name] for name in names if name in config]
    if any(value != values[0] for value in values):
        raise UserError(" and ".join(f"{name}={_text(config[name])}" for name in names) + " contradict")
    return dict.fromkeys(names, values[0]) if values else {}


def _check_experts(config: dict[str, Any], architecture: Architecture) -> None:
    """Raises UserError for numbers of experts, or a width, that no layer can have."""
    for name in _expert_fields(architecture):
        if name in config and not _is_size(config[name], _LARGEST_SIZE):
            raise UserError(f"{name}={_text(config[name])} is not a whole number of at least 1")
    if architecture.experts is not None:
        name = architecture.experts.count[0]
        if config["num_experts_per_tok"] > config[name]:
            raise UserError(f"num_experts_per_tok={config['num_experts_per_tok']} is more than {name}={config[name]}")


def windowed_layers(config: Mapping[str, Any]) -> tuple[bool, ...]:
    """For each layer, whether its attention has the sliding window of the config, as read_hf_config returns it."""
    layers: int = config["num_hidden_layers"]
    kinds = config.get("layer_types")
    architecture = ARCHITECTURES[config["model_type"]]
    if config.get("sliding_window") is None:
        return (False,) * layers
    if architecture.window != "switch":
        return (architecture.window == "always",) * layers
    if not config.get("use_sliding_window"):
        return (False,) * layers
    if kinds is not None:
        return tuple(kind == _KINDS[True] for kind in kinds)
    if architecture.ropeless_layers:
        return ropeless_layers(config)
    return tuple(layer >= config.get("max_window_layers", 28) for layer in range(layers))


def _check_ropeless(config: dict[str, Any], architecture: Architecture) -> None:
    """Raises UserError for layers without rope that are not described, or that the architecture lacks."""
    layers, interval = config.get("no_rope_layers"), config.get("no_rope_layer_interval", 4)
    if not architecture.ropeless_layers:
        for name in ("no_rope_layers", "no_rope_layer_interval"):
            if config.get(name) is not None:
                raise UserError(f"{name}={_text(config[name])} is not built: this model_type has rope in every layer")
        return
    count = config["num_hidden_layers"]
    if layers is None and not _is_size(interval, _LARGEST_SIZE):
        raise UserError(f"no_rope_layer_interval={_text(interval)} is not a whole number of at least 1")
    if layers is not None and (
        not isinstance(layers, list) or len(layers) != count or not all(_is_digit(layer) for layer in layers)
    ):
        raise UserError(f"no_rope_layers={_text(layers)} is not 0 or 1 for each of num_hidden_layers={count}")


def _is_digit(value: Any) -> bool:
    return value in (0, 1) and not isinstance(value, bool)


def ropeless_layers(config: Mapping[str, Any]) -> tuple[bool, ...]:
    """For each layer, whether its queries and keys are not rotated, by the config, as read_hf_config returns it."""
    count: int = config["num_hidden_layers"]
    if not ARCHITECTURES[config["model_type"]].ropeless_layers:
        return (False,) * count
    if (layers := config.get("no_rope_layers")) is not None:
        return tuple(not rotated for rotated in layers)
    return tuple((layer + 1) % config.get("no_rope_layer_interval", 4) == 0 for layer in range(count))


def _spellings(config: dict[str, Any], architecture: Architecture) -> dict[str, Any]:
    """The fields whose names differ between transformers 4 and 5, under both names."""
    rope = read_rope(config, architecture.rope_theta, partial=architecture.partial_rope)
    pairs = int(head_dim(config) * rope.partial) // 2
    for name in ("short_factor", "long_factor"):
        if name in rope.scaling and len(rope.scaling[name]) != pairs:
            raise UserError(
                f"{name} has {len(rope.scaling[name])} numbers, not one for each of {pairs} pairs of a head"
            )
    if int(head_dim(config) * rope.partial) % 2:
        raise UserError(
            f"partial_rotary_factor={rope.partial} of {head_dim(config)} numbers are not pairs, as rope needs"
        )
    both: dict[str, Any] = rope.spellings()
    dtypes = {name: config[name] for name in ("dtype", "torch_dtype") if config.get(name) is not None}
    for name, value in dtypes.items():
        if value not in _DTYPES:
            raise UserError(f"{name}={_text(value)} is not a type of weights that is read; known: {', '.join(_DTYPES)}")
    if len(set(dtypes.values())) > 1:
        raise UserError(f"dtype={_text(dtypes['dtype'])} and torch_dtype={_text(dtypes['torch_dtype'])} contradict")
    for value in dtypes.values():
        both |= {"dtype": value, "torch_dtype": value}
    return both


def _same(value: Any, allowed: Any) -> bool:
    """True if the values are equal, where true and false differ from 1 and 0."""
    return value == allowed and isinstance(value, bool) == isinstance(allowed, bool)


def _is_size(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < math.inf


def _text(value: Any, quote: bool = True) -> str:
    """A value as JSON, on one line, cut to 60 characters."""
    text = json.dumps(value) if quote or not isinstance(value, str) else json.dumps(value)[1:-1]
    return text if len(text) <= 60 else text[:57] + "..."
