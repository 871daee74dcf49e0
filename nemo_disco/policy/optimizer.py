"""megatron-core's distributed optimizer and learning-rate schedule, with two additions for long runs.

A gradient that is not finite is detected before it is applied; and torch's AdamW (megatron's choice without Transformer
Engine and apex) keeps its step count of each parameter through save and load.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from nemo_disco.config.schema import OptimConfig
from nemo_disco.policy import optimizer_shards
from nemo_disco.policy.optimizer_shards import Shards


@dataclass(frozen=True)
class StepResult:
    """Result of one optimizer step."""

    grad_norm: float  # of the whole gradient, before clipping
    applied: bool  # False if the gradient was not finite, so that nothing changed
    lr: float = math.nan  # the learning rate of this step


class Optimizer:
    """The optimizer of this rank's chunks and its learning-rate schedule."""

    def __init__(self, network: list[Any], config: OptimConfig, settings: OptimizerConfig, total_steps: int) -> None:
        """settings: from options.optimizer_config. total_steps: optimizer steps (mini-batches) of the whole run, over
        which the schedule decays."""
        self.clip_grad = settings.clip_grad
        self.megatron = get_megatron_optimizer(settings, network)
        self._offloaded: list[tuple[torch.Tensor, torch.Tensor]] = []  # (tensor on the device, its copy on the host)
        # Cleared while a checkpoint that is being written has yet to read the live weights, or the live moments.
        self.weights_read, self.moments_read = threading.Event(), threading.Event()
        self.weights_read.set()
        self.moments_read.set()
        for part in self._parts:
            if isinstance(part.optimizer, torch.optim.AdamW) and torch.cuda.is_available():
                for group in part.optimizer.param_groups:
                    group["fused"] = True  # one kernel for all parameters; not run
        warmup = config.sched.warmup_steps
        self.schedule = OptimizerParamScheduler(
            self.megatron,
            init_lr=config.lr / warmup if warmup else config.lr,
            max_lr=config.lr,
            min_lr=config.sched.min_lr,
            lr_warmup_steps=warmup,
            lr_decay_steps=max(total_steps, warmup + 1),
            lr_decay_style=config.sched.name,
            start_wd=config.weight_decay,
            end_wd=config.weight_decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
        )

    @property
    def _parts(self) -> list[Any]:
        return list(getattr(self.megatron, "chained_optimizers", [self.megatron]))

    def reload_weights(self) -> None:
        """Copy the model's weights into the optimizer's float32 weights, after they were changed from outside."""
        self.megatron.reload_model_params()
        for part in self._parts:
            if part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8:  # they are then part of Adam's state
                for p in (p for group in part.optimizer.param_groups for p in group["params"]):
                    if part.optimizer.state[p]:
                        part.optimizer.set_scaled_state(p, "master_param", p.detach().float())

    def gradient_norm(self) -> float:
        """Norm of the whole gradient, before clipping. A collective."""
        self.megatron.prepare_grads()
        return float(self.megatron.get_grad_norm())

    def step(self) -> StepResult:
        """Clip and apply the gradient, and advance the schedule; do neither if the gradient is not finite.

        Waits for a checkpoint that has yet to read the weights or moments.
        """
        norm = self.gradient_norm()
        if not math.isfinite(norm):
            return StepResult(norm, applied=False)
        if self.clip_grad > 0:
            for part in self._parts:
                decoupled = part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
                clip_grad_by_total_norm_fp32(part.get_parameters(), self.clip_grad, norm, use_decoupled_grad=decoupled)
        self.weights_read.wait()
        self.moments_read.wait()
        self.megatron.step_with_ready_grads()
        lr = float(self.megatron.param_groups[0]["lr"])
        self.schedule.step(increment=1)
        return StepResult(norm, applied=True, lr=lr)

    def offload(self) -> None:
        """Move moments and float32 weights to the host, once a checkpoint has read them; frees their device memory."""
        self.moments_read.wait()
        cuda = torch.cuda.is_available()
        buffers = {id(tensor): host for tensor, host in self._offloaded}
        self._offloaded = []
        for tensor in self._state_tensors():
            host = buffers.get(id(tensor))
            if host is None:  # reused later: page-locked memory is slow to allocate
                host = torch.empty_like(tensor, device="cpu", pin_memory=cuda)
            host.copy_(tensor, non_blocking=True)
            self._offloaded.append((tensor, host))
        if cuda:
            torch.cuda.synchronize()
        for tensor, _ in self._offloaded:
            tensor.untyped_storage().resize_(0)
        if cuda:
            torch.cuda.empty_cache()

    def restore(self) -> None:
        """Move back the tensors that `offload` moved."""
        for tensor, host in self._offloaded:
            tensor.untyped_storage().resize_(host.untyped_storage().nbytes())
            tensor.copy_(host, non_blocking=True)

    def _state_tensors(self) -> list[torch.Tensor]:
        """The moments, and for a bf16 model the float32 weights (a float32 model trains its own parameters)."""
        tensors = []
        for part in self._parts:
            tensors += [t for state in part.optimizer.state.values() for t in state.values() if _is_large(t)]
            tensors += [p for group in part.shard_fp32_from_float16_groups for p in group if p is not None]
        return tensors

    # --- state, for checkpoints ---

    @property
    def steps(self) -> int:
        """Number of applied optimizer steps."""
        return int(self.schedule.num_steps)

    @property
    def state_bytes(self) -> int:
        """Bytes of this rank's moments and, for a bf16 model, float32 weights."""
        self._allocate()
        return sum(t.nbytes for t in self._state_tensors())

    def shards(self, *, copied: bool) -> list[Shards]:
        """This rank's pieces of the state of each of megatron's optimizers: copies on the host, or the live tensors."""
        self._allocate()
        return [optimizer_shards.shards(part, copied=copied) for part in self._parts]

    def sharded_state(self, model_state: dict[str, Any], shards: list[Shards]) -> dict[str, Any]:
        """megatron's sharded tensors of the state, in the shapes of the model's parameters, so that any layout can read
        them. model_state: the model's own sharded state. A collective of the background groups."""
        pairs = zip(self._parts, shards, strict=True)
        return {str(i): optimizer_shards.assemble(part, model_state, own) for i, (part, own) in enumerate(pairs)}

    def loadable_state(self, model_state: dict[str, Any]) -> dict[str, Any]:
        """Uninitialised tensors in place of those of `sharded_state`, to be filled from a checkpoint."""
        self._allocate()
        return {str(i): optimizer_shards.loadable(part, model_state) for i, part in enumerate(self._parts)}

    def load_sharded_state(self, state: dict[str, Any], steps: int) -> None:
        """Load the filled tensors of `loadable_state`, which were saved after `steps` applied steps. The learning rate
        follows from the present configuration."""
        for i, part in enumerate(self._parts):
            adam = part.optimizer
            for state_of_p in adam.state.values():
                state_of_p.pop("step", None)  # megatron would copy it from the checkpoint, which has none
            optimizer_shards.load(part, state[str(i)])
            for group in adam.param_groups:
                if not isinstance(adam, torch.optim.AdamW):
                    group["step"] = steps
                    continue
                for p in group["params"]:
                    adam.state[p]["step"] = _step_count(group, p, steps)  # one tensor each: AdamW counts in place
        self.schedule.num_steps = 0
        self.schedule.step(increment=steps)

    def _allocate(self) -> None:
        """Give each parameter the state that its first step would give it, since megatron may read it before."""
        for adam in (part.optimizer for part in self._parts):
            for group, p in [(g, p) for g in adam.param_groups for p in g["params"]]:
                if adam.state[p]:
                    continue
                if hasattr(adam, "initialize_state"):  # Transformer Engine's
                    adam.initialize_state(p, False)
                    continue
                adam.state[p] = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
                if isinstance(adam, torch.optim.AdamW):
                    adam.state[p]["step"] = _step_count(group, p, 0)


def _step_count(group: dict[str, Any], parameter: torch.Tensor, steps: int) -> torch.Tensor:
    """A step count as AdamW stores it: on the parameter's device if it is fused, else on the host."""
    return torch.tensor(float(steps), device=parameter.device if group.get("fused") else "cpu")


def _is_large(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0
