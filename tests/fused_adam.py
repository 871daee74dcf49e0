"""A stand-in in plain torch for Transformer Engine's FusedAdam, as megatron-core 0.16 uses it, for machines without it.

Interface and errors are those of transformer_engine/pytorch/optimizers/fused_adam.py at v2.11: states are allocated at
the first step, steps are counted per group, gradients may be in another attribute (decoupled_grad), and a state may be
stored in another dtype than that in which it is read and set.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import megatron.core.optimizer as megatron_optimizer
import pytest
import torch
from megatron.core.optimizer import distrib_optimizer, optimizer_config
from torch import Tensor


class FusedAdam(torch.optim.Optimizer):
    """AdamW with the interface of Transformer Engine's FusedAdam."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        bias_correction: bool = True,
        adam_w_mode: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
        master_weight_dtype: torch.dtype = torch.float32,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
        use_decoupled_grad: bool = False,
        store_param_remainders: bool = False,
        set_grad_none: bool | None = None,
    ) -> None:
        assert adam_w_mode and bias_correction and set_grad_none is None and not (amsgrad or capturable)
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.master_weights, self.use_decoupled_grad = master_weights, use_decoupled_grad
        self.store_param_remainders = store_param_remainders and master_weights
        self.dtypes = {"exp_avg": exp_avg_dtype, "exp_avg_sq": exp_avg_sq_dtype, "master_param": master_weight_dtype}

    def initialize_state(self, param: Tensor, store_param_remainders: bool) -> None:
        assert not store_param_remainders, "this stand-in does not store parameter remainders"
        for name in ("exp_avg", "exp_avg_sq"):
            self.state[param][name] = torch.zeros(param.shape, dtype=self.dtypes[name])
        if self.master_weights:
            self.set_scaled_state(param, "master_param", param.detach().clone().float())

    def get_unscaled_state(self, param: Tensor, name: str) -> Tensor:
        state: Tensor = self.state[param][name]
        return state if state.dtype is torch.float32 else state.float()

    def set_scaled_state(self, param: Tensor, name: str, unscaled: Tensor) -> None:
        remainders = self.store_param_remainders and name == "master_param" and param.dtype is torch.bfloat16
        assert unscaled.dtype is (torch.int16 if remainders else torch.float32)
        self.state[param].setdefault(name, torch.empty(param.shape, dtype=self.dtypes[name])).copy_(unscaled)

    def state_dict(self) -> dict[str, Any]:
        content = super().state_dict()
        params = [p for group in self.param_groups for p in group["params"]]
        content["state"] = {
            i: {name: self.get_unscaled_state(params[i], name) for name in state}
            for i, state in content["state"].items()
        }
        return content

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        params = [p for group in self.param_groups for p in group["params"]]
        for i, state in state_dict["state"].items():
            self.state[params[i]] = {}
            for name, value in state.items():
                self.set_scaled_state(params[i], name, value.float())

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                if not self.state[p]:
                    self.initialize_state(p, False)
                gradient = p.decoupled_grad if self.use_decoupled_grad else p.grad
                if gradient is not None:
                    self._update(p, gradient.float(), group)

    def _update(self, p: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        (beta1, beta2), step = group["betas"], group["step"]
        mean, square = (self.get_unscaled_state(p, name) for name in ("exp_avg", "exp_avg_sq"))
        mean = mean * beta1 + gradient * (1 - beta1)
        square = square * beta2 + gradient**2 * (1 - beta2)
        change = (mean / (1 - beta1**step)) / ((square / (1 - beta2**step)).sqrt() + group["eps"])
        master = self.get_unscaled_state(p, "master_param") if self.master_weights else p
        new = master - group["lr"] * (change + group["weight_decay"] * master)
        p.copy_(new)
        for name, value in (("exp_avg", mean), ("exp_avg_sq", square), ("master_param", new)):
            if name in self.state[p]:
                self.set_scaled_state(p, name, value)


def install_stand_in(patch: pytest.MonkeyPatch) -> None:
    """Make megatron-core use the stand-in as if Transformer Engine were installed."""
    module = ModuleType("transformer_engine.pytorch.optimizers")
    module.FusedAdam = FusedAdam  # type: ignore[attr-defined]
    patch.setitem(sys.modules, "transformer_engine", ModuleType("transformer_engine"))
    patch.setitem(sys.modules, "transformer_engine.pytorch", ModuleType("transformer_engine.pytorch"))
    patch.setitem(sys.modules, "transformer_engine.pytorch.optimizers", module)
    for user in (megatron_optimizer, distrib_optimizer):
        patch.setattr(user, "Adam", FusedAdam)
    patch.setattr(megatron_optimizer, "USING_PYTORCH_OPTIMIZER", False)
    for user in (megatron_optimizer, optimizer_config):
        patch.setattr(user, "is_te_min_version", lambda *_, **__: True)
    patch.setattr(distrib_optimizer, "HAVE_APEX_OR_TE", True)
    patch.setattr(distrib_optimizer, "USING_TE_OPTIMIZER", True)
