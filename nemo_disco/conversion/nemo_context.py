"""Writer of context/io.json in a NeMo 2.0 directory, from which NeMo builds the model, in fiddle's serialization.

Needs no NeMo: the file holds the names of NeMo's classes and their arguments.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_disco.models.architecture import ARCHITECTURES
from nemo_disco.models.shape import model_shape
from nemo_disco.runtime.errors import UserError

TOKENIZER = "nemo_tokenizer"  # the directory beside io.json
# Fields of a rope: name in config.json -> name in NeMo.
_SCALINGS = {
    "factor": "scale_factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "old_context_len",
}
_CHOICES = ("attention_bias", "mlp_bias", "hidden_act")  # fields that choose another network of a family
_FIDDLE = "fiddle._src.config"


@dataclass
class _Call:
    """A class and its arguments."""

    module: str
    name: str
    arguments: dict[str, Any] = field(default_factory=dict)


def write_context(directory: Path, config: Mapping[str, Any]) -> None:
    """Write io.json beside the tokenizer's directory, nemo_tokenizer/. config: as from read_hf_config.

    Raises UserError for a rope that NeMo's classes do not have, and for a network that is not the one they build.
    """
    shape, rope = model_shape(config), config["rope_parameters"]
    name, kinds, scaling = shape.architecture.nemo, shape.architecture.nemo_configs, rope["rope_type"]
    if name is None:
        raise UserError(f"config.json: model_type {config['model_type']!r} is not written for NeMo 2.0")
    if scaling not in kinds:
        raise UserError(f"config.json: NeMo 2.0 has no rope of type {scaling!r} for {name}; its model would be another")
    if shape.window is not None:
        raise UserError(f"config.json: sliding_window={shape.window} is not written for NeMo 2.0")
    if shape.architecture != ARCHITECTURES[config["model_type"]]:
        chosen = ", ".join(f"{key}={config[key]}" for key in _CHOICES if key in config)
        raise UserError(f"config.json: {chosen}: not written for NeMo 2.0, whose {name} is another network")
    sizes = shape.megatron_sizes() | {
        "window_size": None,  # its Mistral has a window if nothing is said
        "vocab_size": shape.vocab,
        "seq_length": shape.max_positions,
        "rotary_base": rope["rope_theta"],
        "share_embeddings_and_output_weights": shape.tied,
        "make_vocab_size_divisible_by": 1,
    }
    sizes |= {_SCALINGS[key]: value for key, value in rope.items() if key in _SCALINGS}
    models = f"nemo.collections.llm.gpt.model.{name.lower()}"
    tokenizer = _Call(
        "nemo.collections.common.tokenizers.huggingface.auto_tokenizer",
        "AutoTokenizer",
        {"pretrained_model_name": TOKENIZER},
    )
    network = _Call(models, kinds[scaling], sizes)
    model = _Call(models, f"{name}Model", {"config": network, "tokenizer": tokenizer})
    context = _Call("nemo.lightning.io.pl", "TrainerContext", {"model": model, "trainer": None, "extra": {}})
    (directory / "io.json").write_text(json.dumps(_Fiddle().document(context), indent=1) + "\n")


class _Fiddle:
    """JSON of fiddle.experimental.serialization, version 0.0.1: objects by key, each with its metadata."""

    def __init__(self) -> None:
        self._objects: dict[str, Any] = {}
        self._counts: dict[str, int] = {}

    def document(self, root: _Call) -> dict[str, Any]:
        reference = self._add(root, "<root>")
        counts = dict.fromkeys(self._objects, 1)
        return {"root": reference, "objects": self._objects, "refcounts": counts, "version": "0.0.1"}

    def _add(self, value: Any, path: str) -> dict[str, Any]:
        if isinstance(value, _Call):
            return self._call(value, path)
        if isinstance(value, dict):
            return self._dict()
        return {"type": "leaf", "value": value, "paths": [path]}

    def _call(self, call: _Call, path: str) -> dict[str, Any]:
        items = [[f"Attr(name='{k}')", self._add(v, f"{path}.{k}")] for k, v in call.arguments.items()]
        names = self._put(
            "tuple", _reference("builtins", "tuple"), [[f"Index(index={i})", k] for i, k in enumerate(call.arguments)]
        )
        metadata = [
            ["Attr(name='fn_or_cls')", _reference(call.module, call.name)],
            ["Attr(name='argument_names')", names],
            ["Attr(name='argument_tags')", self._dict()],
            ["Attr(name='argument_history')", self._dict()],
        ]
        kind = _reference(_FIDDLE, "BuildableTraverserMetadata")
        description = self._put("buildable_traverser_metadata", kind, metadata, kind)
        return self._put(call.name.lower(), _reference(_FIDDLE, "Config"), items, description, [path])

    def _dict(self) -> dict[str, Any]:
        empty: dict[str, Any] = {"type": _reference("builtins", "tuple"), "items": [], "metadata": None}
        return self._put("dict", _reference("builtins", "dict"), [], empty)

    def _put(
        self, name: str, kind: dict[str, Any], items: list[Any], metadata: Any = None, paths: list[str] | None = None
    ) -> dict[str, Any]:
        self._counts[name] = self._counts.get(name, 0) + 1
        key = f"{name}_{self._counts[name]}"
        self._objects[key] = {"type": kind, "items": items, "metadata": metadata} | ({"paths": paths} if paths else {})
        return {"type": "ref", "key": key}


def _reference(module: str, name: str) -> dict[str, Any]:
    return {"type": "pyref", "module": module, "name": name}
