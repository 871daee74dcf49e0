"""Comparison of the policy's network with transformers', module by module, which finds a wrong description of a family.

Both compute the same sequence in the same precision; the first module whose output differs, though its input agreed, is
the one that is described wrongly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nemo_disco.data.rollouts import Rollouts
from nemo_disco.generation.megatron.decoder import Decoder
from nemo_disco.models.architecture import EMBEDDING, FINAL_NORM, LAYER, OUTPUT
from nemo_disco.models.rope import has_long_angles
from nemo_disco.policy.policy import Policy
from nemo_disco.runtime.collectives import on_every_rank, on_first_rank
from nemo_disco.runtime.errors import UserError

TOKENS = 128  # at most so many are compared
# Largest relative difference of a module's output that is rounding. transformers' norms are in float32 at least.
LIMITS = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 0.1}
Outputs = dict[str, Tensor]


def compare_with_transformers(policy: Policy, rollouts: Rollouts) -> str:
    """Compare all modules on the rollouts' longest sequence, and return a line with the largest difference.

    Needs the memory of transformers' model on the first rank's host. Raises UserError that names the first module that
    differs, and for experts in bfloat16. A collective.
    """
    if policy.shape.experts and policy.dtype is torch.bfloat16:
        raise UserError(
            "verify.reference=transformers: in bfloat16 rounding sends tokens to other experts, which would count as a "
            "wrong module; set verify.dtype=float32 or float64"
        )
    lengths = rollouts.prompt_lengths + rollouts.response_lengths
    longest = int(lengths.argmax())
    tokens = torch.cat([rollouts.prompt(longest), rollouts.response(longest)])[:TOKENS]
    _check_angles(policy, len(tokens))
    own = _policy_outputs(policy, tokens)
    return on_first_rank(lambda: _describe(own, _transformers_outputs(policy, tokens), LIMITS[policy.dtype]))


def _check_angles(policy: Policy, tokens: int) -> None:
    """Raises UserError if transformers would choose other angles for so few tokens than a run does."""
    rope = policy.hf_config.rope_parameters
    if has_long_angles(policy.hf_config, policy.longest) and not has_long_angles(policy.hf_config, tokens):
        raise UserError(
            f"verify.reference=transformers: longrope has its long angles in this run and would have its short ones in "
            f"transformers; lower data.max_prompt_length and generation.max_response_length to at most "
            f"{rope['original_max_position_embeddings']} together"
        )


def _module(weight_name: str) -> str:
    return weight_name.rpartition(".")[0]


def _names(layer: int) -> tuple[str, str]:
    """transformers' names of a layer's attention and MLP. layer: from 0."""
    attention, mlp = (LAYER[role].parts[0].split(".")[0] for role in ("projection", "down"))
    return f"model.layers.{layer}.{attention}", f"model.layers.{layer}.{mlp}"


def _keep(outputs: Outputs, name: str) -> Callable[[Any, Any, Any], None]:
    """A hook that keeps a module's output [tokens, ...], with the bias that a megatron module returns beside it."""

    def hook(_module: Any, _inputs: Any, output: Any) -> None:
        value, bias = output if isinstance(output, tuple) else (output, None)
        value = value if not isinstance(bias, Tensor) or bias.dim() > 1 else value + bias
        outputs[name] = value.detach().cpu().reshape(-1, value.shape[-1])

    return hook


def _policy_outputs(policy: Policy, tokens: Tensor) -> Outputs:
    """The outputs of the policy's modules, of all pipeline stages. A collective."""
    policy.gather_weights()
    decoder = Decoder(policy)
    outputs: Outputs = {}
    modules: dict[str, Any] = {}
    for chunk in policy.model.chunks:
        if chunk.pre_process:
            modules[_module(EMBEDDING.parts[0])] = chunk.embedding
        for layer in chunk.decoder.layers:
            modules |= zip(_names(layer.layer_number - 1), (layer.self_attention, layer.mlp), strict=True)
        if chunk.post_process:
            modules[_module(FINAL_NORM.parts[0])] = chunk.decoder.final_layernorm
    hooks = [module.register_forward_hook(_keep(outputs, name)) for name, module in modules.items()]
    try:
        with decoder.decoding():
            cache, ids = decoder.new_cache(1), tokens.to(policy.device)[None]
            cache.reserve(len(tokens), len(tokens))
            logits = decoder.forward(ids, torch.arange(len(tokens), device=policy.device)[None], cache, 0, None)
    finally:
        for hook in hooks:
            hook.remove()
    if logits is not None:
        outputs[_module(OUTPUT.parts[0])] = logits.cpu()
    stages = on_every_rank(lambda: outputs, decoder.pipeline_group)
    return {name: value for stage in stages for name, value in stage.items()}


def _transformers_outputs(policy: Policy, tokens: Tensor) -> Outputs:
    """The outputs of transformers' modules, on the host, in the order of a forward pass."""
    from transformers import AutoModelForCausalLM

    config = policy.config
    # Its faster ways to compute experts know no float64.
    plain = {"experts_implementation": "eager"} if policy.shape.experts else {}
    model: Any = AutoModelForCausalLM.from_pretrained(
        config.path, dtype=policy.dtype, local_files_only=True, trust_remote_code=config.trust_remote_code, **plain
    )
    outputs: Outputs = {}
    names = [name for layer in range(policy.shape.layers) for name in _names(layer)]
    for name in (_module(EMBEDDING.parts[0]), *names, _module(FINAL_NORM.parts[0])):
        model.get_submodule(name).register_forward_hook(_keep(outputs, name))
    with torch.no_grad():
        outputs[_module(OUTPUT.parts[0])] = model(tokens[None]).logits[0, :, : policy.vocabulary]
    return outputs


def _describe(own: Outputs, expected: Outputs, limit: float) -> str:
    """A line on the largest difference. Raises UserError that names the first module beyond the limit."""
    differences: dict[str, float] = {}
    for name, whole in expected.items():
        value = own[name]
        reference = whole[-len(value) :].double()  # the policy computes the head at the last token alone
        difference = float((value.double() - reference).norm() / reference.norm())
        if not difference <= limit:
            before = max(differences.values(), default=0.0)
            raise UserError(
                f"verify.reference=transformers: the network differs from transformers' first in {name}: relative "
                f"difference {difference:.2e}; before it {before:.2e} at most. Its description in "
                "nemo_disco/models/architecture.py, or the field of config.json that it is built from, is read wrongly"
            )
        differences[name] = difference
    worst = max(differences, key=differences.__getitem__)
    return f"{len(differences)} modules agree; largest relative difference {differences[worst]:.2e}, in {worst}"
