"""megatron-core's settings for a run, from this program's: network, data parallelism and optimizer.

Builds nothing. Every fusion or overlap that is left off has its reason beside it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer import TransformerConfig

from nemo_disco.config.schema import ModelConfig, OptimConfig
from nemo_disco.models.shape import ModelShape
from nemo_disco.runtime.errors import UserError

# model.fp8 -> Transformer Engine's number format and megatron's name of the recipe.
_FP8 = {"delayed": ("hybrid", "delayed"), "current": ("hybrid", "tensorwise"), "blockwise": ("e4m3", "blockwise")}
# Steps over which delayed scaling takes the maximum: Transformer Engine's own default.
_AMAX_HISTORY = 1024
_ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "relu": F.relu}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def transformer_config(
    shape: ModelShape, config: ModelConfig, dtype: torch.dtype, device: torch.device, finalize: Callable[..., None]
) -> TransformerConfig:
    """megatron-core's description of the network, this run's parallelism and its kernels.

    finalize: the function that reduces gradients after the last micro-batch. Raises UserError for a setting that this
    network cannot have.
    """
    _check(shape, config)
    full = config.activations_checkpoint_granularity == "full"
    return TransformerConfig(
        **shape.megatron_sizes(),
        **shape.megatron_layers(),
        **shape.megatron_experts(),
        normalization=shape.architecture.norm,
        # With it megatron sums the gradients of these norms over tensor-parallel ranks, which share a wide one.
        qk_layernorm=shape.architecture.qk_norm and not shape.architecture.wide_qk_norm,
        activation_func=_ACTIVATIONS[shape.architecture.activation],
        gated_linear_unit=True,
        add_bias_linear=False,
        hidden_dropout=0.0,  # the old and the new log-probs must differ by the weights alone
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=config.virtual_pipeline_model_parallel_size,
        context_parallel_size=config.context_parallel_size,
        sequence_parallel=config.sequence_parallel,
        variable_seq_lengths=True,
        expert_model_parallel_size=config.expert_model_parallel_size,
        expert_tensor_parallel_size=config.expert_tensor_parallel_size,
        moe_token_dispatcher_type="alltoall",  # its default is refused with variable lengths, without experts too
        moe_router_load_balancing_type="none",
        moe_router_pre_softmax=True,  # PolicyRouter decides; megatron refuses one expert a token with False
        recompute_granularity=config.activations_checkpoint_granularity,
        recompute_method="uniform" if full else None,
        recompute_num_layers=1 if full else None,
        use_cpu_initialization=device.type == "cpu",
        calculate_per_token_loss=True,  # sums, never means: the loss carries its own denominators
        finalize_model_grads_func=finalize,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,  # PolicyLayer adds the residual
        apply_rope_fusion=config.apply_rope_fusion,
        bias_activation_fusion=config.bias_activation_fusion,
        # Adds a matrix product straight into main_grad; the kernel is apex's.
        gradient_accumulation_fusion=importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None,
        # Interleaved stages send while they compute. Of two stages, each is both the next and the previous one of the
        # other: sent in batches, their messages are mixed up where micro-batches differ in length.
        overlap_p2p_comm=config.virtual_pipeline_model_parallel_size is not None,
        batch_p2p_comm=False,
        **_fp8_options(config),
    )


def _check(shape: ModelShape, config: ModelConfig) -> None:
    """Raises UserError for a fused activation or FP8 scaling that this network cannot have."""
    activation = shape.architecture.activation
    if config.bias_activation_fusion and activation != "silu":
        raise UserError(
            "model.bias_activation_fusion=true: megatron-core's fused activation is SwiGLU, and this model's "
            f"hidden_act is {activation}; set it to false"
        )
    if shape.experts and config.fp8 == "delayed":
        raise UserError(
            "model.fp8=delayed: with experts its scales are not in a checkpoint; would work: current or blockwise"
        )
    # Without sequence parallelism each tensor-parallel rank would send the same tokens (layouts.check_shape).
    assert not shape.experts or config.tensor_model_parallel_size == 1 or config.sequence_parallel


def _fp8_options(config: ModelConfig) -> dict[str, Any]:
    if config.fp8 is None:
        return {}
    number_format, recipe = _FP8[config.fp8]
    return {
        "fp8": number_format,
        "fp8_recipe": recipe,
        "fp8_param": config.fp8_param_gather,
        "fp8_amax_history_len": _AMAX_HISTORY,
        "fp8_amax_compute_algo": "max",
    }


def data_parallel_config(config: ModelConfig, dtype: torch.dtype, overlap: bool) -> DistributedDataParallelConfig:
    """megatron-core's settings of data parallelism: BF16 weights have float32 main gradients.

    overlap: gradients are reduced during the backward pass, and weights gathered during the forward pass after a step
    (to read them earlier, call Policy.gather_weights).
    """
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=dtype is torch.bfloat16,
        use_distributed_optimizer=True,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap,
        fp8_param_gather=config.fp8_param_gather,
    )


def optimizer_config(
    config: OptimConfig, dtype: torch.dtype, clip_grad: float, fp8: str | None = None
) -> OptimizerConfig:
    """megatron-core's settings of the optimizer: float32 main weights, moments in config.moments_dtype (bfloat16 needs
    Transformer Engine's Adam)."""
    moments = _DTYPES[config.moments_dtype]
    return OptimizerConfig(
        optimizer=config.name,
        lr=config.lr,
        min_lr=config.sched.min_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.betas[0],
        adam_beta2=config.betas[1],
        adam_eps=config.eps,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        fp8_recipe=None if fp8 is None else _FP8[fp8][1],
        use_distributed_optimizer=True,
        clip_grad=clip_grad,
        use_precision_aware_optimizer=moments is not torch.float32,
        # Remainders are of no use without their BF16 weights, and a checkpoint has float32 weights.
        store_param_remainders=False,
        exp_avg_dtype=moments,
        exp_avg_sq_dtype=moments,
    )
