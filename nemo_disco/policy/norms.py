"""The norms of the local layers, and those that no other library computes under tensor parallelism."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with megatron's constructor and its mark for summing gradients under sequence parallelism, which
    megatron's own local norm does not support."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class WideRMSNorm(torch.nn.Module):
    """RMSNorm of all heads of a token together, which tensor parallelism splits: its ranks sum their squares."""

    def __init__(self, config: Any, hidden_size: int, eps: float, *, heads: int) -> None:
        """hidden_size: of one head; heads: those of all ranks together."""
        super().__init__()
        self.group = parallel_state.get_tensor_model_parallel_group()
        self.eps, self.width = eps, heads * hidden_size
        device = torch.device(torch.cuda.current_device())
        self.weight = torch.nn.Parameter(
            torch.ones(self.width // self.group.size(), dtype=config.params_dtype, device=device)
        )
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)

    def forward(self, x: Tensor) -> Tensor:
        """x [S, 1, groups, heads of each, d], of this rank."""
        wide = x.flatten(2)
        exact = wide.to(torch.promote_types(x.dtype, torch.float32))
        squares = exact.square().sum(-1, keepdim=True)
        if self.group.size() > 1:  # the first sums forward, the second backward
            squares = reduce_from_tensor_model_parallel_region(squares, group=self.group)
            squares = copy_to_tensor_model_parallel_region(squares, group=self.group)
        return (exact * torch.rsqrt(squares / self.width + self.eps) * self.weight).to(x.dtype).view_as(x)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> Any:
        """The weight of all ranks, of which each has a share."""
        state = self.state_dict(keep_vars=True)
        groups = {"tp_group": self.group, "dp_cp_group": metadata["dp_cp_group"]}
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0}, sharded_offsets, **groups)


def wide_norm(heads: int) -> type:
    """The class of a WideRMSNorm of so many heads."""

    class Norm(WideRMSNorm):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs, heads=heads)

    return Norm
