"""Errors of the policy and the engine on this device; unless they are within bounds, no speed counts.

Compares the policy with transformers in float32 on the CPU, large micro-batches with the smallest ones, Transformer
Engine's layers (also in FP8) with the local layers, the engine's log-probs with the trainer's, and each variant that a
later section times with float64.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import variant_errors
from setting import (
    CUDA,
    DEVICE,
    TEMPERATURE,
    RolloutSizes,
    Setting,
    build_policy,
    make_random_rollouts,
    model_directory,
    relative_error,
    with_generation_log_probs,
)
from torch import Tensor

from nemo_disco.algorithms import MiniBatch, build_objective
from nemo_disco.data.rollouts import Rollouts
from nemo_disco.generation.engine import SamplingParams
from nemo_disco.generation.megatron.engine import MegatronEngine
from nemo_disco.models.architecture import ARCHITECTURES
from nemo_disco.models.shape import ModelShape
from nemo_disco.policy import modules

Gradients = dict[str, Tensor]
MODEL = ModelShape(4, 512, 1408, 8, 2, 64, 8192, tied=False, architecture=ARCHITECTURES["qwen2"], max_positions=4096)
# The largest error allowed. bf16 keeps 8 bits: a log-prob of a few nats is off by about 1e-2, a gradient by about 1%.
BOUNDS = {
    "float32_log_probs": 1e-4,
    "bf16_log_probs": 2e-2,
    "bf16_token_weights": 5e-2,
    "bf16_gradient": 5e-2,
    "compiled_against_plain_activation": 2e-3,
    "packed_against_unpacked_log_probs": 2e-2,
    "packed_against_unpacked_gradient": 3e-2,
    "transformer_engine_against_local_log_probs": 2e-2,
    "transformer_engine_against_local_gradient": 5e-2,
    "sampling_against_training_log_probs": 5e-2,
    # FP8 keeps 2 or 3 bits of the operands of a matrix product.
    **{f"fp8_{recipe}_log_probs": 1e-1 for recipe in ("delayed", "current", "blockwise")},
    **{f"fp8_{recipe}_gradient": 3e-1 for recipe in ("delayed", "current", "blockwise")},
}


def run(setting: Setting) -> dict[str, Any]:
    """Relative errors (of norms), and for each whether it is within its bound.

    `passed` is true if all errors of the defaults are. `ways` has every variant, the defaults among them.
    """
    shape = setting.shape("1p5b") if setting.tiny else MODEL
    limit = setting.size(400, 24)
    rollouts = make_random_rollouts(shape.vocab, RolloutSizes(4, 4, limit, setting.size(40, 5)))
    budget = setting.size(4096, 200)
    with model_directory(shape, scale=0.05) as path:
        errors = _measure_errors(path, rollouts, budget, limit)
        within = {name: errors[name] <= bound for name, bound in BOUNDS.items() if name in errors}
        results = {**errors, "bounds": BOUNDS, "within_bounds": within, "passed": all(within.values())}
        print(json.dumps(results), flush=True)  # run_all.py reads this line if a variant ends the process
        variants = variant_errors.run(setting, path)
    within |= {name: variants[name]["right"] for name in variant_errors.list_default_variants()}
    return results | {"ways": variants, "way_bounds": variant_errors.BOUNDS, "passed": all(within.values())}


def _measure_errors(path: Path, rollouts: Rollouts, budget: int, limit: int) -> dict[str, float]:
    """The errors of BOUNDS, except Transformer Engine's where it cannot be used."""
    log_probs, weights, gradient = _compute_reference(path, rollouts, limit)
    float32 = build_policy(path, budget, dtype=torch.float32, transformer_engine=False)
    errors = {"float32_log_probs": relative_error(float32.log_probs(rollouts)[0], log_probs)}
    del float32
    local = _evaluate(path, rollouts, budget, weights, transformer_engine=False)
    longest = int(rollouts.total_lengths.max())
    smallest = _evaluate(path, rollouts, longest, weights, transformer_engine=False)
    errors |= {
        "bf16_log_probs": relative_error(local[0], log_probs),
        "bf16_token_weights": relative_error(_token_weights(rollouts, local[0], log_probs, limit), weights),
        "bf16_gradient": _gradient_error(local[1], gradient),
        "compiled_against_plain_activation": _activation_error(),
        "packed_against_unpacked_log_probs": relative_error(local[0], smallest[0]),
        "packed_against_unpacked_gradient": _gradient_error(local[1], smallest[1]),
        "sampling_against_training_log_probs": _sampling_error(path, budget),
    }
    return errors | _transformer_engine_errors(path, rollouts, budget, weights, local)


def _compute_reference(path: Path, rollouts: Rollouts, limit: int) -> tuple[Tensor, Tensor, Gradients]:
    """Log-probs [T], DisCO's token weights [T] and the gradient under them, by transformers in float32 on the CPU."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    by_response = []
    for i in range(len(rollouts)):
        ids = torch.cat([rollouts.prompt(i), rollouts.response(i)])[None]
        start = int(rollouts.prompt_lengths[i])
        log_p = (model(ids).logits[0, start - 1 : -1] / TEMPERATURE).log_softmax(-1)
        by_response.append(log_p.gather(1, ids[0, start:, None])[:, 0])
    log_probs = torch.cat(by_response)
    values = log_probs.detach()
    weights = _token_weights(rollouts, values, values, limit)
    (weights.float() * log_probs).sum().backward()
    return values, weights, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def _token_weights(rollouts: Rollouts, log_probs: Tensor, old: Tensor, limit: int) -> Tensor:
    """DisCO's token weights [T] for all rollouts as one mini-batch. old: the old log-probs [T]."""
    batch = MiniBatch(
        log_probs=log_probs.cpu().double(),
        old_log_probs=old.cpu().double(),
        lengths=rollouts.response_lengths,
        question_ids=rollouts.question_ids,
        rewards=rollouts.rewards,
        max_response_length=limit,
    )
    return build_objective({"name": "disco"})(batch).token_weights


def _evaluate(path: Path, rollouts: Rollouts, budget: int, weights: Tensor, **changes: Any) -> tuple[Tensor, Gradients]:
    """Log-probs [T] and gradient under these token weights, by a new policy. changes: as in compose_model_config."""
    policy = build_policy(path, budget, **changes)
    log_probs = policy.log_probs(rollouts)[0].cpu()
    on_device = weights.to(DEVICE)
    policy.accumulate(rollouts, lambda index, values: on_device[index].float() * values.log_probs, everywhere=True)
    return log_probs, {name: g.detach().float().cpu() for name, g in policy.named_gradients()}


def _gradient_error(actual: Gradients, expected: Gradients) -> float:
    """Relative error of the gradient as one vector of all its tensors."""
    names = sorted(expected)
    flat = [torch.cat([g[name].flatten().float() for name in names]) for g in (actual, expected)]
    return relative_error(flat[0], flat[1])


def _activation_error() -> float:
    """Relative error of the compiled activation against plain code; 0 on a CPU, where it is not compiled."""
    x = torch.randn(64, 1, 256, device=DEVICE, dtype=torch.bfloat16)
    plain = modules.gated.__wrapped__  # type: ignore[attr-defined]
    return relative_error(modules.gated(x, F.silu), plain(x, F.silu))


def _sampling_error(path: Path, budget: int) -> float:
    """Relative error of the engine's log-probs against the policy's, for tokens that the engine sampled."""
    policy = build_policy(path, budget)
    engine = MegatronEngine(policy, [1])
    prompts = [[3, 5, 7 + i] for i in range(8) for _ in range(2)]
    responses = engine.generate(prompts, range(len(prompts)), SamplingParams(TEMPERATURE, 16))
    rollouts = Rollouts.pack(
        prompts, [r.tokens for r in responses], [r.log_probs for r in responses], list(range(16)), [False] * 16
    )
    expected = with_generation_log_probs(rollouts, policy.log_probs(rollouts)[0]).generation_log_probs
    return relative_error(rollouts.generation_log_probs, expected)


def _transformer_engine_errors(
    path: Path, rollouts: Rollouts, budget: int, weights: Tensor, local: tuple[Tensor, Gradients]
) -> dict[str, float]:
    """Errors of Transformer Engine's layers, in bf16 and by each FP8 recipe, against the local layers in bf16.

    Empty without Transformer Engine or CUDA. local: log-probs and gradient by the local layers.
    """
    from megatron.core.models.gpt.gpt_layer_specs import HAVE_TE

    if not (HAVE_TE and CUDA):
        return {}
    bf16 = _evaluate(path, rollouts, budget, weights, transformer_engine=True)
    errors = {
        "transformer_engine_against_local_log_probs": relative_error(bf16[0], local[0]),
        "transformer_engine_against_local_gradient": _gradient_error(bf16[1], local[1]),
    }
    for recipe in ("delayed", "current", "blockwise"):
        fp8 = _evaluate(path, rollouts, budget, weights, transformer_engine=True, fp8=recipe)
        errors[f"fp8_{recipe}_log_probs"] = relative_error(fp8[0], local[0])
        errors[f"fp8_{recipe}_gradient"] = _gradient_error(fp8[1], local[1])
    return errors
