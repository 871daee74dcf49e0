"""The gate between the rollout engine and the policy: both must give the sampled tokens the same log-probs.

`verify` and the first step of `train` always stop at a disagreement; with an engine in a process of its own `evaluate`
and `train` also stop before they evaluate; a later step of `train` warns. Knows the policy and the engine by their
contracts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nemo_disco.algorithms.mismatch import Token, in_float32, likely_cause, mismatch, tokens_at, worst_tokens
from nemo_disco.config.schema import RunConfig
from nemo_disco.data.rollouts import Rollouts
from nemo_disco.generation.engine import Engine, SamplingParams
from nemo_disco.policy.policy import Policy
from nemo_disco.rollout.prompts import PromptSet
from nemo_disco.rollout.requests import packed
from nemo_disco.runtime.errors import UserError

# verify.max_kl where it is null: nats a token.
_MAX_KL, _MAX_KL_BF16 = 1e-3, 1e-2
# What a probe asks of an engine before anything else: questions, and tokens of each response.
_PROBE_QUESTIONS, _PROBE_TOKENS = 16, 256


class Agreement:
    """Compares the two engines' log-probs of a run's rollouts, by the limits of verify.max_mismatch and max_kl."""

    def __init__(self, config: RunConfig, policy: Policy, tokenizer: Any, say: Callable[[str], None]) -> None:
        """say: where a line for the person goes."""
        self.config, self.policy, self.tokenizer, self.say = config, policy, tokenizer, say

    def check_step(self, step: int, rollouts: Rollouts, old_log_probs: Tensor) -> None:
        """Compare the rollouts that the step after `step` steps trains on. old_log_probs [T]: the policy's.

        The first step of a run (step 0; not the first one after a resume) raises UserError if the engines disagree, or
        if any log-prob of either is not finite. At each later one where they do there is a warning, one line. A
        collective.

        Not compared after the first step: log-probs of the policy that are not finite, which training made so and whose
        mini-batches are skipped; and a step with any response of older weights than now, which differs by what training
        changed. So an asynchronous run compares its first step and the first one after a resume. Dynamic sampling drops
        groups before this: they are not compared.
        """
        if step == 0:
            apart = mismatch(old_log_probs, rollouts.generation_log_probs)
            refuse_disagreement(self.config, self.policy, self.tokenizer, rollouts, old_log_probs, apart)
            return
        if not bool(old_log_probs.isfinite().all()) or int(rollouts.weight_versions.min()) < step:
            return
        apart = mismatch(old_log_probs, rollouts.generation_log_probs)
        if not _agree(self.config, self.policy, apart):
            self.say(f"step {step + 1}: warning: {_figures(self.config, self.policy, apart)}; see nemo-disco verify")


def check_engine(config: RunConfig, policy: Policy, engine: Engine, questions: PromptSet) -> None:
    """Sample short responses to a few of the questions, and raise UserError if the policy gives their tokens other
    log-probs than the engine. Afterwards the engine has the policy's weights and is ready. A collective.

    The embedded engine is not probed: it has no process, version or weights of its own, and a run's first step compares
    it all the same.
    """
    if config.generation.engine == "megatron":
        return
    picked = questions.select(range(min(_PROBE_QUESTIONS, len(questions))))
    # The whole distribution: under top-p some engines' log-probs are of the truncated one.
    limit = min(_PROBE_TOKENS, config.generation.longest_response)
    sampling = SamplingParams(config.evaluation.temperature, limit)
    rollouts, _ = packed(picked, engine.generate(picked.prompts, range(len(picked)), sampling))
    engine.sleep()  # as in a training step: an engine on the training GPUs leaves the policy no room beside it
    log_probs = _log_probs(policy, rollouts, config.evaluation.temperature)
    apart = mismatch(log_probs, rollouts.generation_log_probs)
    refuse_disagreement(config, policy, questions.tokenizer, rollouts, log_probs, apart)
    engine.wake()
    engine.update_weights(policy.named_weights, int(rollouts.weight_versions.min()))


def refuse_disagreement(
    config: RunConfig,
    policy: Policy,
    tokenizer: Any,
    rollouts: Rollouts,
    log_probs: Tensor,
    apart: dict[str, float],
    setting: str = "trainer.precision",
) -> None:
    """Raises UserError if a log-prob of either is not finite, whatever the limits, or if they differ by more than the
    limits (kl_limit). A collective.

    log_probs [T]: the policy's; apart: their mismatch; setting: what decided the type of the policy's weights.
    """
    _refuse_non_finite(config, policy, tokenizer, rollouts, log_probs, setting)
    if _agree(config, policy, apart):
        return
    cause = likely_cause(
        log_probs,
        rollouts,
        plain_log_probs=_log_probs(policy, rollouts, 1.0),
        dtype=policy.dtype,
        setting=setting,
        quantization=config.generation.quantization,
    )
    worst = "; ".join(describe_token(tokenizer, token) for token in worst_tokens(log_probs, rollouts, 3))
    raise UserError(
        f"{_figures(config, policy, apart)}; worst: {worst}; likely cause: {cause}; "
        "to go on all the same, raise the limits"
    )


def _refuse_non_finite(
    config: RunConfig, policy: Policy, tokenizer: Any, rollouts: Rollouts, log_probs: Tensor, setting: str
) -> None:
    """Raises UserError if a log-prob of either engine is not finite: no limit says anything of those."""
    for whose, values in (
        ("policy", log_probs),
        (f"engine {config.generation.engine}", rollouts.generation_log_probs),
    ):
        bad = (~values.isfinite()).nonzero()[:, 0].tolist()
        if not bad:
            continue
        [first] = tokens_at(log_probs, rollouts, bad[:1])
        token = describe_token(tokenizer, first)
        if whose != "policy":
            hint = "look at its version and generation.options"
        elif policy.dtype is torch.bfloat16:
            hint = f"its weights overflow in bfloat16: try {in_float32(setting)}"
        else:
            hint = f"its weights overflow in {str(policy.dtype)[6:]}: look at model.path={config.model.path}"
        raise UserError(f"the {whose} gives {len(bad)} of {len(values)} tokens no finite log-prob: {token}; {hint}")


def describe_token(tokenizer: Any, token: Token) -> str:
    """A token on which the engines differ, for a message."""
    text = tokenizer.decode([token.token])
    return (
        f"token {token.token} ({text!r}), number {token.place} of response {token.response}: "
        f"trainer {token.trainer:.4f}, engine {token.engine:.4f}"
    )


def kl_limit(config: RunConfig, dtype: torch.dtype) -> tuple[float, str]:
    """The largest KL that passes, and where it comes from, for a message. dtype: of the policy's weights.

    A missing q/k norm, bias or rope costs 0.1 nats a token and more. Two correct implementations of a real model differ
    by about 1e-3 where they round to bfloat16. An engine that quantizes is held to the strict limit in any precision:
    it samples from other weights, which is to be allowed knowingly.
    """
    verify, quantization = config.verify, config.generation.quantization
    if verify.max_kl is not None:
        return verify.max_kl, f"verify.max_kl={verify.max_kl:g}"
    if dtype is not torch.bfloat16:
        return _MAX_KL, f"verify.max_kl=null: {_MAX_KL:g} in {str(dtype)[6:]}"
    if quantization is not None:
        return _MAX_KL, f"verify.max_kl=null: {_MAX_KL:g} with generation.quantization={quantization}"
    return _MAX_KL_BF16, f"verify.max_kl=null: {_MAX_KL_BF16:g} in bfloat16, for its rounding"


def _agree(config: RunConfig, policy: Policy, apart: dict[str, float]) -> bool:
    """Not so for nan."""
    limit, _ = kl_limit(config, policy.dtype)
    return apart["mismatch/mean_exp_abs"] <= config.verify.max_mismatch and apart["mismatch/kl_k3"] <= limit


def _figures(config: RunConfig, policy: Policy, apart: dict[str, float]) -> str:
    _, why = kl_limit(config, policy.dtype)
    return (
        f"trainer and engine {config.generation.engine} disagree: mean e^|d| {apart['mismatch/mean_exp_abs']:.4g} "
        f"(verify.max_mismatch={config.verify.max_mismatch:g}), KL {apart['mismatch/kl_k3']:.3g} ({why})"
    )


def _log_probs(policy: Policy, rollouts: Rollouts, temperature: float) -> Tensor:
    """[T] the policy's log-probs at another temperature. A collective."""
    before, policy.temperature = policy.temperature, temperature
    try:
        return policy.log_probs(rollouts)[0]
    finally:
        policy.temperature = before
