"""Rotary position embedding: the cosines and sines of a batch of tokens, and their application to queries and keys.

One tensor for all layers, in training and in decoding. The angles per position come from models.rope.
"""

from __future__ import annotations

import torch
from megatron.core.models.common.embeddings import rope_utils
from torch import Tensor

from nemo_disco.models.rope import Angles
from nemo_disco.policy.compiled import compiled
from nemo_disco.runtime.errors import UserError


class Rope:
    """The rotation of each position. fused: by Transformer Engine's kernel, which takes angles. Not run."""

    def __init__(self, angles: Angles, dtype: torch.dtype, device: torch.device, *, fused: bool = False) -> None:
        """angles: those of the model. dtype: of the queries and keys. Raises UserError if they cannot be fused."""
        if fused and angles.factor != 1:
            raise UserError(
                "model.apply_rope_fusion=true: Transformer Engine's rope has no attention factor, and this model's is "
                f"{angles.factor:.4g}; set it to false"
            )
        self.inv_freq, self.factor, self.dtype, self.fused = angles.inv_freq.to(device), angles.factor, dtype, fused

    def at(self, positions: Tensor) -> Tensor:
        """[S, 1, 1, 2 r] for positions [S]: the factors of the r numbers of a head that are rotated, and those of the
        numbers that they are rotated with; the angles [S, 1, 1, r], float32, if fused."""
        half = torch.outer(positions.float(), self.inv_freq)
        if self.fused:
            return torch.cat([half, half], dim=-1)[:, None, None]
        cos, sin = half.cos() * self.factor, half.sin() * self.factor
        return torch.cat([cos, cos, -sin, sin], dim=-1)[:, None, None].to(self.dtype)

    def __call__(self, x: Tensor, rotation: Tensor) -> Tensor:
        """The queries or keys x [S, 1, groups, heads of each, d], rotated. rotation: of `at`."""
        if self.fused:
            rotated: Tensor = rope_utils.fused_apply_rotary_pos_emb(x.flatten(2, 3), rotation)
            return rotated.view(x.shape)
        return rotate(x, rotation[:, :, None])


def no_rope(x: Tensor, rotation: Tensor) -> Tensor:  # noqa: ARG001 - Rope's signature
    """x as it is: the rope of a layer that has none."""
    return x


@compiled
def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """x [S, 1, groups, heads, d], the first r numbers of each head rotated by rotation [S, 1, 1, 1, 2 r]."""
    own, other = rotation.chunk(2, dim=-1)
    rotated = own.shape[-1]
    if rotated < x.shape[-1]:
        return torch.cat([rotate(x[..., :rotated], rotation), x[..., rotated:]], dim=-1)
    first, second = x.chunk(2, dim=-1)
    return x * own + torch.cat([second, first], dim=-1) * other
