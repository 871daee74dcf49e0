"""Reader of the rotary position embedding (rope) of a config.json, under transformers 4's names, 5's, or both.

The angles are computed by transformers, so that a scaling is the same as there. Two kinds depend there on the longest
sequence of a call. Of `dynamic`, only lengths up to max_position_embeddings are trained on, where it is the default
rope. `longrope` has one set of angles in a whole run: that for long sequences, if the run's longest one is longer than
original_max_position_embeddings. vLLM does the same: a cached key could not change while a response grows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from nemo_disco.runtime.errors import UserError

# The kinds of rope that are built, each with the parameters that it needs, and those that it may have.
SCALINGS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
}
OPTIONAL: dict[str, tuple[str, ...]] = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
}
_LARGEST = 1e30  # of any parameter


@dataclass(frozen=True)
class Rope:
    """A model's rope. kind: a key of SCALINGS; theta: the base of the angles; scaling: the parameters of the kind;
    partial: the share of each head, from its beginning, that is rotated."""

    kind: str
    theta: float
    scaling: dict[str, Any]
    partial: float = 1.0

    def spellings(self) -> dict[str, Any]:
        """The fields of config.json: rope_theta and rope_scaling of transformers 4, rope_parameters of 5."""
        scaling = {"rope_type": self.kind, **self.scaling}
        partial = {} if self.partial == 1 else {"partial_rotary_factor": self.partial}
        return {
            "rope_theta": self.theta,
            "rope_scaling": None if self.kind == "default" else scaling,
            "rope_parameters": {"rope_theta": self.theta, **scaling, **partial},
            **partial,
        }


def read_rope(config: dict[str, Any], default_theta: float, *, partial: bool = False) -> Rope:
    """The rope of a config.json. default_theta: the base if it names none. partial: it may rotate a part of each head.

    Raises UserError for a scaling that is not built, and for two spellings that contradict each other.
    """
    theta = config.get("rope_theta")
    fields = {name: config[name] for name in ("rope_parameters", "rope_scaling") if config.get(name)}
    spelled = [config, *(value for value in fields.values() if isinstance(value, dict))]
    if any("rope_theta" in value and value["rope_theta"] is None for value in spelled):
        raise UserError("rope_theta=null is not a number above 0; give one, or remove the field")
    fields = {name: _with_length(name, value, config) for name, value in fields.items()}
    ropes = {name: _read(name, value, theta, default_theta) for name, value in fields.items()}
    if len(ropes) == 2 and ropes["rope_parameters"] != ropes["rope_scaling"]:
        raise UserError(
            f"rope_parameters={fields['rope_parameters']} and rope_scaling={fields['rope_scaling']} (with "
            f"rope_theta={theta}) contradict; remove the one that is wrong"
        )
    rope = next(iter(ropes.values()), None) or _read("rope_theta", {}, theta, default_theta)
    return replace(rope, partial=_read_partial(spelled, partial))


def _with_length(name: str, value: Any, config: dict[str, Any]) -> Any:
    """A field with the original_max_position_embeddings that Phi-3 has beside it. Raises UserError if they differ."""
    key = "original_max_position_embeddings"
    if (
        config.get(key) is None
        or not isinstance(value, dict)
        or value.get("rope_type", value.get("type")) != "longrope"
    ):
        return value
    if value.get(key, config[key]) != config[key]:
        raise UserError(f"{name}: {key}={value[key]!r} there and {config[key]!r} beside it contradict")
    return {**value, key: config[key]}


def _read_partial(spelled: list[dict[str, Any]], allowed: bool) -> float:
    """The share of each head that is rotated, from the objects that may name it. Raises UserError."""
    given = [value["partial_rotary_factor"] for value in spelled if value.get("partial_rotary_factor") is not None]
    for factor in given:
        if factor != given[0]:
            raise UserError(f"partial_rotary_factor={given[0]!r} and {factor!r} contradict")
        if factor != 1 and not allowed:
            raise UserError(f"partial_rotary_factor={factor!r} is not built for this model_type, only 1")
        if _positive("partial_rotary_factor", factor) > 1:
            raise UserError(f"partial_rotary_factor={factor!r} is more than 1")
    return given[0] if given else 1.0


@dataclass(frozen=True)
class Angles:
    """The angles by which rope rotates: inv_freq [rotated / 2] a position, a float32 tensor, where `rotated` numbers of
    a head are rotated, its first ones. factor: of the rotated queries and keys."""

    inv_freq: Any
    factor: float = 1.0


def has_long_angles(hf_config: Any, longest: int) -> bool:
    """Whether the angles are longrope's for sequences longer than original_max_position_embeddings."""
    rope = hf_config.rope_parameters
    return bool(rope["rope_type"] == "longrope" and longest > rope["original_max_position_embeddings"])


def read_angles(hf_config: Any, longest: int = 0) -> Angles:
    """The angles of a transformers config. longest: tokens of the longest sequence of the run, for longrope."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding  # others know no partial_rotary_factor

    kind = hf_config.rope_parameters["rope_type"]
    if kind == "longrope":
        return Angles(*ROPE_INIT_FUNCTIONS[kind](hf_config, None, seq_len=longest))
    rope = Phi3RotaryEmbedding(hf_config)
    return Angles(rope.inv_freq, rope.attention_scaling)


def _read(name: str, value: Any, theta: float | None, default_theta: float) -> Rope:
    """The rope of one field. theta: the rope_theta beside it, if any. Raises UserError."""
    if not isinstance(value, dict):
        raise UserError(f"{name}={value!r} is not an object with a rope_type")
    named = [value[key] for key in ("rope_type", "type") if key in value]
    if wrong := [kind for kind in named if not isinstance(kind, str)]:
        raise UserError(f"{name}: rope_type {wrong[0]!r} is not a text")
    kinds = set(named)
    if len(kinds) > 1:
        raise UserError(f"{name}: rope_type={value['rope_type']!r} and type={value['type']!r} contradict")
    kind = kinds.pop() if kinds else "default"
    if kind not in SCALINGS:
        raise UserError(f"rope_type {kind!r} is not built; known: {', '.join(SCALINGS)}")
    if "attn_factor" in value and kind == "yarn":
        raise UserError(_explain_attn_factor(name, value))
    optional = OPTIONAL.get(kind, ())
    allowed = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *SCALINGS[kind], *optional}
    if unknown := sorted(map(str, value.keys() - allowed)):
        raise UserError(f"{name}: {unknown[0]}={value[unknown[0]]!r} is not built for rope_type {kind!r}")
    inner = value.get("rope_theta")
    if inner is not None and theta is not None and inner != theta:
        raise UserError(f"{name}: rope_theta={inner!r} there and {theta!r} beside it contradict")
    base = inner if inner is not None else theta if theta is not None else default_theta
    # To transformers null is as good as left out, but for `truncate`.
    keys = [*SCALINGS[kind], *(k for k in optional if k in value and (value[k] is not None or k == "truncate"))]
    scaling = {key: _read_parameter(f"{name}: {key}", key, value.get(key)) for key in keys}
    if _positive("rope_theta", base) == 1 or scaling.get("original_max_position_embeddings") == 1:
        raise UserError(f"{name}: rope_theta={base!r} and original_max_position_embeddings must be above 1")
    return Rope(kind, base, scaling)


def _read_parameter(name: str, key: str, value: Any) -> Any:
    """The value of a rope's parameter. Raises UserError if it is not one that the parameter may have."""
    if key == "truncate":
        if not isinstance(value, bool):
            raise UserError(f"{name}={value!r} is neither true nor false")
        return value
    if key in ("short_factor", "long_factor"):
        if not isinstance(value, list):
            raise UserError(f"{name}={value!r} is not a list of numbers")
        return [_positive(f"{name}[{i}]", number) for i, number in enumerate(value)]
    return _positive(name, value)


def _explain_attn_factor(name: str, value: dict[str, Any]) -> str:
    """A line on attn_factor of yarn, which some published models have, and which no library here reads."""
    factor, own = (_positive(f"{name}: {key}", value.get(key)) for key in ("factor", "attn_factor"))
    product = own * (1 + 0.1 * math.log(max(factor, 1)))
    return (
        f"{name}: attn_factor={own!r} is ignored by transformers and by vLLM; to obey it write "
        f"attention_factor={product:.6g} instead, to ignore it as they do remove it"
    )


def _positive(name: str, value: Any) -> float:
    """The value, which must be a number above 0. Raises UserError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < _LARGEST:
        raise UserError(f"{name}={value!r} is not a number above 0")
    return value
