"""Reader of the rotary position embedding (rope) of a config.json, under transformers 4's names, 5's, or both.

The angles are computed by transformers, so that a scaling is the same as there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from nemo_disco.runtime.errors import UserError

# The kinds of rope that are built, each with its parameters: those that change the angles alone (attention factor 1).
SCALINGS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True)
class Rope:
    """A model's rope. kind: a key of SCALINGS; theta: the base of the angles; scaling: the parameters of the kind."""

    kind: str
    theta: float
    scaling: dict[str, float]

    def spellings(self) -> dict[str, Any]:
        """The fields of config.json: rope_theta and rope_scaling of transformers 4, rope_parameters of 5."""
        scaling = {"rope_type": self.kind, **self.scaling}
        return {
            "rope_theta": self.theta,
            "rope_scaling": None if self.kind == "default" else scaling,
            "rope_parameters": {"rope_theta": self.theta, **scaling},
        }


def read_rope(config: dict[str, Any], default_theta: float) -> Rope:
    """The rope of a config.json. default_theta: the base if it names none.

    Raises UserError for a scaling that is not built, and for two spellings that contradict each other.
    """
    theta = config.get("rope_theta")
    fields = {name: config[name] for name in ("rope_parameters", "rope_scaling") if config.get(name)}
    ropes = {name: _read(name, value, theta, default_theta) for name, value in fields.items()}
    if len(ropes) == 2 and ropes["rope_parameters"] != ropes["rope_scaling"]:
        raise UserError(
            f"rope_parameters={fields['rope_parameters']} and rope_scaling={fields['rope_scaling']} (with "
            f"rope_theta={theta}) contradict; remove the one that is wrong"
        )
    return next(iter(ropes.values()), None) or _read("rope_theta", {}, theta, default_theta)


def inverse_frequencies(hf_config: Any) -> Any:
    """[head_dim / 2] angles per position, float32, of a transformers config."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    return LlamaRotaryEmbedding(hf_config).inv_freq


def _read(name: str, value: Any, theta: float | None, default_theta: float) -> Rope:
    """The rope of one field. theta: the rope_theta beside it, if any. Raises UserError."""
    if not isinstance(value, dict):
        raise UserError(f"{name}={value!r} is not an object with a rope_type")
    kinds = {value[key] for key in ("rope_type", "type") if isinstance(value.get(key), str)}
    if len(kinds) > 1:
        raise UserError(f"{name}: rope_type={value['rope_type']!r} and type={value['type']!r} contradict")
    kind = kinds.pop() if kinds else "default"
    if kind not in SCALINGS:
        raise UserError(f"rope_type {kind!r} is not built; known: {', '.join(SCALINGS)}")
    allowed = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *SCALINGS[kind]}
    if unknown := sorted(map(str, value.keys() - allowed)):
        raise UserError(f"{name}: {unknown[0]}={value[unknown[0]]!r} is not built for rope_type {kind!r}")
    if value.get("partial_rotary_factor", 1) != 1:
        raise UserError(f"{name}: partial_rotary_factor={value['partial_rotary_factor']!r} is not built, only 1")
    inner = value.get("rope_theta")
    if inner is not None and theta is not None and inner != theta:
        raise UserError(f"{name}: rope_theta={inner!r} there and {theta!r} beside it contradict")
    base = inner if inner is not None else theta if theta is not None else default_theta
    scaling = {key: _positive(f"{name}: {key}", value.get(key)) for key in SCALINGS[kind]}
    return Rope(kind, _positive("rope_theta", base), scaling)


def _positive(name: str, value: Any) -> float:
    """The value, which must be a number above 0. Raises UserError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UserError(f"{name}={value!r} is not a number above 0")
    return value
