"""Published models of families that are not built here, so that `plan` can say what they would need.

Only `plan` reads their shapes: hf_config.py refuses the directory of such a model. Must not import torch.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_disco.models.architecture import UNBUILT, Architecture, Experts, Weight
from nemo_disco.models.shape import ModelShape
from nemo_disco.runtime.errors import UserError


@dataclass(frozen=True)
class _BiasedExperts(Experts):
    """gpt-oss's experts and router, which have biases, with the attention's sinks, one number per head."""

    @property
    def weights(self) -> dict[str, Weight]:
        """Their weights by role, for counts alone: all of an expert is counted as split by expert tensor parallelism,
        though each rank would have the biases of `down` whole."""
        biases = {
            "sinks": Weight("self_attention.sinks", ("self_attn.sinks",), (("heads",),), split=0),
            "router_bias": Weight("mlp.router.bias", ("mlp.router.bias",), (("experts",),)),
            "expert_biases": Weight(
                "mlp.experts.biases",
                tuple(f"mlp.experts.{part}.bias" for part in ("gate", "up", "down")),
                (("ffn",), ("ffn",), ("hidden",)),
                split=0,
                expert=True,
            ),
        }
        return super().weights | biases


_GPT_OSS = Architecture(
    "gpt_oss",
    None,
    {},
    qkv_bias=True,
    projection_bias=True,
    experts=_BiasedExperts(
        count=("num_local_experts",),
        width="intermediate_size",
        router="mlp.router",
        gate="mlp.experts.{expert}.gate",
        up="mlp.experts.{expert}.up",
        down="mlp.experts.{expert}.down",
    ),
)


def _gpt_oss(layers: int, experts: int) -> ModelShape:
    every_second: dict[str, Any] = {"window": 128, "windowed": (True, False) * (layers // 2)}
    sizes: dict[str, Any] = {"experts": experts, "experts_per_token": 4, "max_positions": 131072}
    return ModelShape(layers, 2880, 2880, 64, 8, 64, 201088, tied=False, architecture=_GPT_OSS, **sizes, **every_second)


# model_type and shape of each; None: there is no estimate.
PUBLISHED_UNBUILT: dict[str, tuple[str, ModelShape | None]] = {
    "gpt-oss-20b": ("gpt_oss", _gpt_oss(layers=24, experts=32)),
    "gpt-oss-120b": ("gpt_oss", _gpt_oss(layers=36, experts=128)),
    "DeepSeek-V3": ("deepseek_v3", None),
}


def find_unbuilt(path: str) -> tuple[ModelShape, str] | None:
    """The shape of a published model that is not built here and a line that says why; None for any other path.

    The last part of the path is its name, where nothing exists. Raises UserError for one that has no estimate.
    """
    name = Path(path).name
    if name not in PUBLISHED_UNBUILT or os.path.exists(path):
        return None
    kind, shape = PUBLISHED_UNBUILT[name]
    refusal = f"{name} cannot be trained here yet: {UNBUILT[kind]}."
    if shape is None:
        raise UserError(
            f"{refusal} There is no estimate either: one here is of layers that are all alike, with keys and values of "
            "each head in the cache, and this model has three layers without experts and a cache of latent vectors"
        )
    return shape, f"{refusal} The plan is an estimate from its published shape, of a run that would be refused."
