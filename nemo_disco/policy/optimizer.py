"""megatron-core's distributed optimizer and schedule, with the two things a long run needs of them.

A gradient that is not finite is seen before it is applied; and torch's AdamW (what megatron takes where neither
Transformer Engine nor apex is installed) keeps one step count a parameter through save and load.
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
from nemo_disco.policy.optimizer_shards import Shards, assembled, loadable, shards, take


@dataclass(frozen=True)
class StepResult:
    """grad_norm: of the whole gradient, before clipping. applied: False when it was not finite and nothing changed."""

    grad_norm: float
    applied: bool
    lr: float = math.nan  # the learning rate that it was applied with


class Optimizer:
    """The optimizer of this rank's chunks and its learning-rate schedule."""

    def __init__(self, network: list[Any], config: OptimConfig, settings: OptimizerConfig, total_steps: int) -> None:
        """settings: options.optimizer_config's. total_steps: optimizer steps (mini-batches) of the whole run, over
        which the schedule decays."""
        self.clip_grad = settings.clip_grad
        self.megatron = get_megatron_optimizer(settings, network)
        self._waiting: list[tuple[torch.Tensor, torch.Tensor]] = []
        # Set once a checkpoint that is being written has read the live weights, and the live moments.
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

    def zero_grad(self) -> None:
        self.megatron.zero_grad()

    def reload_weights(self) -> None:
        """Take the model's weights for the optimizer's own copy of them (after they were changed from outside)."""
        self.megatron.reload_model_params()
        for part in self._parts:
            if part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8:  # then the copy is the optimizer's state
                for p in (p for group in part.optimizer.param_groups for p in group["params"]):
                    if part.optimizer.state[p]:
                        part.optimizer.set_scaled_state(p, "master_param", p.detach().float())

    def gradient_norm(self) -> float:
        """Of the whole gradient, before clipping. A collective."""
        self.megatron.prepare_grads()
        return float(self.megatron.get_grad_norm())

    def step(self) -> StepResult:
        """Clip and apply the gradient, and move the schedule. Nothing moves if the gradient is not finite.

        Waits for a checkpoint that still reads what changes here.
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
        """Move the moments and the main weights to the host; their memory on the device is free until `restore`."""
        self.moments_read.wait()
        cuda = torch.cuda.is_available()
        kept = {id(tensor): host for tensor, host in self._waiting}
        self._waiting = []
        for tensor in self._state_tensors():
            host = kept.get(id(tensor))
            if host is None:  # once: page-locked memory is dear to get
                host = torch.empty_like(tensor, device="cpu", pin_memory=cuda)
            host.copy_(tensor, non_blocking=True)
            self._waiting.append((tensor, host))
        if cuda:
            torch.cuda.synchronize()
        for tensor, _ in self._waiting:
            tensor.untyped_storage().resize_(0)
        if cuda:
            torch.cuda.empty_cache()

    def restore(self) -> None:
        """Bring back what `offload` moved."""
        for tensor, host in self._waiting:
            tensor.untyped_storage().resize_(host.untyped_storage().nbytes())
            tensor.copy_(host, non_blocking=True)

    def _state_tensors(self) -> list[torch.Tensor]:
        """The moments, and under bf16 the float32 weights; in float32 these are the model's own."""
        tensors = []
        for part in self._parts:
            tensors += [t for state in part.optimizer.state.values() for t in state.values() if _is_large(t)]
            tensors += [p for group in part.shard_fp32_from_float16_groups for p in group if p is not None]
        return tensors

    # --- its state, for checkpoints ---

    @property
    def steps(self) -> int:
        """Optimizer steps that were applied."""
        return int(self.schedule.num_steps)

    @property
    def state_bytes(self) -> int:
        """Of the moments and the float32 weights that this rank holds beside the model's own."""
        self._allocate()
        return sum(t.nbytes for t in self._state_tensors())

    def shards(self, *, copied: bool) -> list[Shards]:
        """Of each part, what this rank holds of its state: copies on the host, or the live tensors."""
        self._allocate()
        return [shards(part, copied=copied) for part in self._parts]

    def saved_state(self, model_state: dict[str, Any], held: list[Shards]) -> dict[str, Any]:
        """megatron's sharded tensors of what `shards` returned, in the model's own shapes, so that any other layout can
        read them. model_state: the model's own sharded state. A collective of the background groups."""
        return {
            str(i): assembled(part, model_state, of_part)
            for i, (part, of_part) in enumerate(zip(self._parts, held, strict=True))
        }

    def loadable_state(self, model_state: dict[str, Any]) -> dict[str, Any]:
        """The tensors of `saved_state`, to be read into; model_state is theirs in turn."""
        self._allocate()
        return {str(i): loadable(part, model_state) for i, part in enumerate(self._parts)}

    def load_sharded_state(self, state: dict[str, Any], steps: int) -> None:
        """Take what was read into the tensors of `loadable_state`, at so many applied steps. The learning rate follows
        from the present configuration."""
        for i, part in enumerate(self._parts):
            moments = part.optimizer.state
            for moment in moments.values():
                moment.pop("step", None)  # megatron would copy a tensor that the checkpoint does not hold
            take(part, state[str(i)])
            if isinstance(part.optimizer, torch.optim.AdamW):
                for group in part.optimizer.param_groups:
                    for p in group["params"]:
                        moments[p]["step"] = _step_count(group, p, steps)  # one each: AdamW counts in place
            else:
                for group in part.optimizer.param_groups:
                    group["step"] = steps
        self.schedule.num_steps = 0
        self.schedule.step(increment=steps)

    def _allocate(self) -> None:
        """Give each parameter the state that its first step would give it: megatron reads it before that, too."""
        for part in self._parts:
            adam = part.optimizer
            pairs = [(group, p) for group in adam.param_groups for p in group["params"]]
            for group, p in pairs:
                if adam.state[p]:
                    continue
                if hasattr(adam, "initialize_state"):  # Transformer Engine's
                    adam.initialize_state(p, False)
                    continue
                adam.state[p] = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
                if isinstance(adam, torch.optim.AdamW):
                    adam.state[p]["step"] = _step_count(group, p, 0)


def _step_count(group: dict[str, Any], parameter: torch.Tensor, steps: int) -> torch.Tensor:
    """As AdamW keeps it: where the parameter is if it is fused, else on the host."""
    return torch.tensor(float(steps), device=parameter.device if group.get("fused") else "cpu")


def _is_large(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0
