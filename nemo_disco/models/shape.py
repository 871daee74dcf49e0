"""The shape of a model, from its Hugging Face config.json alone, for checks and estimates before anything is built.

Reads one JSON file; must not import torch or transformers. The families of hf_config: grouped-query attention, SwiGLU.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_disco.models.directory import explain
from nemo_disco.models.hf_config import FAMILIES, read_hf_config


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder; head_dim in numbers a head, max_positions in tokens."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    qkv_bias: bool
    max_positions: int
    qk_norm: bool = False

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Of keys, and of values."""
        return self.kv_heads * self.head_dim

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer."""
        qkv = self.query_width + 2 * self.kv_width
        attention = self.hidden * qkv + self.query_width * self.hidden + (qkv if self.qkv_bias else 0)
        return attention + 3 * self.hidden * self.ffn + self.norm_parameters

    @property
    def norm_parameters(self) -> int:
        """Parameters of one layer's norms: of its two inputs, and of a query's and a key's head where they have one."""
        return 2 * self.hidden + (2 * self.head_dim if self.qk_norm else 0)

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the embedding; the output layer, where it is not tied, has as many."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """All parameters."""
        embeddings = self.embedding_parameters * (1 if self.tied else 2)
        return self.layers * self.layer_parameters + embeddings + self.hidden


# The published shapes of the papers' models and their larger kin, so that `plan` can speak of a model that is not on
# this machine; each also goes by its size.
_DISTILL: dict[str, Any] = {"tied": False, "max_positions": 131072}
KNOWN = {
    "DeepSeek-R1-Distill-Qwen-1.5B": ModelShape(28, 1536, 8960, 12, 2, 128, 151936, qkv_bias=True, **_DISTILL),
    "DeepSeek-R1-Distill-Qwen-7B": ModelShape(28, 3584, 18944, 28, 4, 128, 152064, qkv_bias=True, **_DISTILL),
    "DeepSeek-R1-Distill-Llama-8B": ModelShape(32, 4096, 14336, 32, 8, 128, 128256, qkv_bias=False, **_DISTILL),
    "DeepSeek-R1-Distill-Qwen-32B": ModelShape(64, 5120, 27648, 40, 8, 128, 152064, qkv_bias=True, **_DISTILL),
    "DeepSeek-R1-Distill-Llama-70B": ModelShape(80, 8192, 28672, 64, 8, 128, 128256, qkv_bias=False, **_DISTILL),
}
SIZES = {name.rpartition("-")[2].lower(): name for name in KNOWN}


def find_shape(path: str) -> tuple[ModelShape | None, str]:
    """The shape of the model at `path`, or the published one of a known name or size (32b), and a line that says which
    it is. Raises UserError for a damaged directory."""
    try:
        exists = Path(path).exists()
    except OSError:
        exists = True  # read_shape says why it cannot be read
    if exists:
        return read_shape(path), f"Model: {path}."
    missing = explain(Path(path))
    name = SIZES.get(path.lower(), Path(path).name)
    if (known := KNOWN.get(name)) is not None:
        return known, f"Model: the published shape of {name}; {missing}."
    sizes = ", ".join(SIZES)
    return None, f"Model: {missing}. So there is no estimate; known without files: model.path={sizes}."


def read_shape(path: str | Path) -> ModelShape:
    """The shape of the model in a Hugging Face directory.

    Raises UserError as read_hf_config does.
    """
    config = read_hf_config(path)
    return ModelShape(**decoder_sizes(config), max_positions=config["max_position_embeddings"])


def decoder_sizes(config: dict[str, Any]) -> dict[str, Any]:
    """Fields of ModelShape but max_positions, of what read_hf_config returns."""
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    family = FAMILIES[config["model_type"]]
    return {
        "layers": config["num_hidden_layers"],
        "hidden": hidden,
        "ffn": config["intermediate_size"],
        "heads": heads,
        "kv_heads": config["num_key_value_heads"],
        "head_dim": config.get("head_dim") or hidden // heads,
        "vocab": config["vocab_size"],
        "tied": config["tie_word_embeddings"],
        "qkv_bias": family.qkv_bias,
        "qk_norm": family.qk_norm,
    }
