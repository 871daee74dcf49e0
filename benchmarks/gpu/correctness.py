"""Correctness, before any speed: this device's policy against transformers in float32 on the CPU, packed against
unpacked, local layers against Transformer Engine's, FP8's error, sampling against training, and each way that a later
section times against float64.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import way_errors
from setting import (
    CUDA,
    DEVICE,
    TEMPERATURE,
    RolloutSizes,
    Setting,
    build_policy,
    made_up_rollouts,
    model_directory,
    relative_error,
    with_policy_scores,
)
from torch import Tensor

from nemo_disco.algorithms import MiniBatch, build_objective
from nemo_disco.data.rollouts import Rollouts
from nemo_disco.generation.engine import SamplingParams
from nemo_disco.generation.megatron.engine import MegatronEngine
from nemo_disco.models.architecture import ARCHITECTURES
from nemo_disco.models.shape import ModelShape
from nemo_disco.policy import layers

Gradients = dict[str, Tensor]
MODEL = ModelShape(4, 512, 1408, 8, 2, 64, 8192, tied=False, architecture=ARCHITECTURES["qwen2"], max_positions=4096)
# What each may be at most. bf16 keeps 8 bits: a log-prob of a few nats is off by some 1e-2, a gradient by 1e-2 of it.
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
    # FP8 keeps 2 or 3 bits of a product's operands.
    **{f"fp8_{recipe}_log_probs": 1e-1 for recipe in ("delayed", "current", "blockwise")},
    **{f"fp8_{recipe}_gradient": 3e-1 for recipe in ("delayed", "current", "blockwise")},
}


def run(setting: Setting) -> dict[str, Any]:
    """Relative errors (norms), each with whether it is within its bound; `passed` is of what the product does by
    default, `ways` has every other one too."""
    shape = setting.shape("1p5b") if setting.tiny else MODEL
    limit = setting.size(400, 24)
    rollouts = made_up_rollouts(shape.vocab, RolloutSizes(4, 4, limit, setting.size(40, 5)))
    budget = setting.size(4096, 200)
    with model_directory(shape, scale=0.05) as path:
        errors = _errors(path, rollouts, budget, limit)
        checked = {name: errors[name] <= bound for name, bound in BOUNDS.items() if name in errors}
        found = {**errors, "bounds": BOUNDS, "within_bounds": checked, "passed": all(checked.values())}
        print(json.dumps(found), flush=True)  # stays if one of the ways ends this process
        ways = way_errors.run(setting, path)
    checked |= {way: ways[way]["right"] for way in way_errors.default_ways()}
    return found | {"ways": ways, "way_bounds": way_errors.BOUNDS, "passed": all(checked.values())}


def _errors(path: Path, rollouts: Rollouts, budget: int, limit: int) -> dict[str, float]:
    log_probs, weights, gradient = _reference(path, rollouts, limit)
    single = build_policy(path, budget, dtype=torch.float32, transformer_engine=False)
    errors = {"float32_log_probs": relative_error(single.log_probs(rollouts)[0], log_probs)}
    del single
    local = _evaluate(path, rollouts, budget, weights, transformer_engine=False)
    longest = int(rollouts.total_lengths.max())
    alone = _evaluate(path, rollouts, longest, weights, transformer_engine=False)
    errors |= {
        "bf16_log_probs": relative_error(local[0], log_probs),
        "bf16_token_weights": relative_error(_token_weights(rollouts, local[0], log_probs, limit), weights),
        "bf16_gradient": _gradient_error(local[1], gradient),
        "compiled_against_plain_activation": _activation_error(),
        "packed_against_unpacked_log_probs": relative_error(local[0], alone[0]),
        "packed_against_unpacked_gradient": _gradient_error(local[1], alone[1]),
        "sampling_against_training_log_probs": _sampling_error(path, budget),
    }
    return errors | _transformer_engine_errors(path, rollouts, budget, weights, local)


def _reference(path: Path, rollouts: Rollouts, limit: int) -> tuple[Tensor, Tensor, Gradients]:
    """transformers in float32 on the CPU: log-probs, DisCO's token weights, and the gradient with these."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    pieces = []
    for i in range(len(rollouts)):
        ids = torch.cat([rollouts.prompt(i), rollouts.response(i)])[None]
        start = int(rollouts.prompt_lengths[i])
        log_p = (model(ids).logits[0, start - 1 : -1] / TEMPERATURE).log_softmax(-1)
        pieces.append(log_p.gather(1, ids[0, start:, None])[:, 0])
    log_probs = torch.cat(pieces)
    scores = log_probs.detach()
    weights = _token_weights(rollouts, scores, scores, limit)
    (weights.float() * log_probs).sum().backward()
    return scores, weights, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def _token_weights(rollouts: Rollouts, log_probs: Tensor, old: Tensor, limit: int) -> Tensor:
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
    policy = build_policy(path, budget, **changes)
    log_probs = policy.log_probs(rollouts)[0].cpu()
    here = weights.to(DEVICE)
    policy.accumulate(rollouts, lambda index, values, _: here[index].float() * values, everywhere=True)
    return log_probs, {name: g.detach().float().cpu() for name, g in policy.named_gradients()}


def _gradient_error(actual: Gradients, expected: Gradients) -> float:
    """Over all tensors together."""
    names = sorted(expected)
    flat = [torch.cat([g[name].flatten().float() for name in names]) for g in (actual, expected)]
    return relative_error(flat[0], flat[1])


def _activation_error() -> float:
    """Of what torch.compile makes of the MLP's activation; 0 on a CPU, where it is not compiled."""
    x = torch.randn(64, 1, 256, device=DEVICE, dtype=torch.bfloat16)
    plain = layers.swiglu.__wrapped__  # type: ignore[attr-defined]
    return relative_error(layers.swiglu(x), plain(x))


def _sampling_error(path: Path, budget: int) -> float:
    policy = build_policy(path, budget)
    engine = MegatronEngine(policy, [1])
    prompts = [[3, 5, 7 + i] for i in range(8) for _ in range(2)]
    responses = engine.generate(prompts, range(len(prompts)), SamplingParams(TEMPERATURE, 16))
    rollouts = Rollouts.pack(
        prompts, [r.tokens for r in responses], [r.log_probs for r in responses], list(range(16)), [False] * 16
    )
    found = with_policy_scores(rollouts, policy.log_probs(rollouts)[0]).generation_log_probs
    return relative_error(rollouts.generation_log_probs, found)


def _transformer_engine_errors(
    path: Path, rollouts: Rollouts, budget: int, weights: Tensor, local: tuple[Tensor, Gradients]
) -> dict[str, float]:
    """Nothing where it is not installed. FP8's are the errors against the local layers in bf16."""
    from megatron.core.models.gpt.gpt_layer_specs import HAVE_TE

    if not (HAVE_TE and CUDA):
        return {}
    fused = _evaluate(path, rollouts, budget, weights, transformer_engine=True)
    errors = {
        "transformer_engine_against_local_log_probs": relative_error(fused[0], local[0]),
        "transformer_engine_against_local_gradient": _gradient_error(fused[1], local[1]),
    }
    for recipe in ("delayed", "current", "blockwise"):
        found = _evaluate(path, rollouts, budget, weights, transformer_engine=True, fp8=recipe)
        errors[f"fp8_{recipe}_log_probs"] = relative_error(found[0], local[0])
        errors[f"fp8_{recipe}_gradient"] = _gradient_error(found[1], local[1])
    return errors
