"""The gate between the rollout engine and the policy: both must give the sampled tokens the same log-probs.

`train` stops at its first step, `evaluate` before it samples with an engine of its own process, `verify` always; a
later training step warns. Knows the policy and the engine by their contracts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from nemo_disco.algorithms.mismatch import Token, likely_cause, mismatch, worst_tokens
from nemo_disco.algorithms.sampling import Questions, packed
from nemo_disco.config.schema import RunConfig
from nemo_disco.data.rollouts import Rollouts
from nemo_disco.generation.engine import Engine, Sampling
from nemo_disco.policy.policy import Policy
from nemo_disco.runtime.errors import UserError

# What `evaluate` asks of an engine before anything else: questions, and tokens of each response.
_PROBE_QUESTIONS, _PROBE_TOKENS = 16, 256


class Agreement:
    """Compares the two engines' log-probs of a run's rollouts, by verify.max_mismatch and verify.max_kl."""

    def __init__(self, config: RunConfig, policy: Policy, tokenizer: Any, say: Callable[[str], None]) -> None:
        """say: where a line for the person goes."""
        self.config, self.policy, self.tokenizer, self.say = config, policy, tokenizer, say
        self._above = False  # whether the last step was

    def check_step(self, step: int, rollouts: Rollouts, old_log_probs: Tensor) -> None:
        """Of the step after `step` steps. old_log_probs [T]: the policy's. Raises UserError at a run's first step if
        the engines disagree; a later step says so, once until they agree again. A collective.

        Log-probs of the policy that are not finite are not the engine's fault, and rollouts of older weights differ by
        what training changed: neither is compared.
        """
        if not bool(old_log_probs.isfinite().all()) or int(rollouts.weight_versions.min()) < step:
            return
        apart = mismatch(old_log_probs, rollouts.generation_log_probs)
        if step == 0:
            refuse_disagreement(self.config, self.policy, self.tokenizer, rollouts, old_log_probs, apart)
            return
        above = not _agree(self.config, apart)
        if above and not self._above:
            self.say(f"step {step + 1}: warning: {_figures(self.config, apart)}; see nemo-disco verify")
        self._above = above


def check_engine(config: RunConfig, policy: Policy, engine: Engine, questions: Questions) -> None:
    """Sample short responses to a few of the questions, and raise UserError if the policy gives their tokens other
    log-probs than the engine. For an engine in a process of its own; a collective."""
    picked = questions.repeat(range(min(_PROBE_QUESTIONS, len(questions))), 1)
    # The whole distribution: under top-p some engines' log-probs are of the truncated one.
    limit = min(_PROBE_TOKENS, config.generation.longest_response)
    sampling = Sampling(config.evaluation.temperature, limit)
    rollouts, _ = packed(picked, engine.generate(picked.prompts, range(len(picked)), sampling))
    log_probs = _log_probs(policy, rollouts, config.evaluation.temperature)
    apart = mismatch(log_probs, rollouts.generation_log_probs)
    refuse_disagreement(config, policy, questions.tokenizer, rollouts, log_probs, apart)


def refuse_disagreement(
    config: RunConfig,
    policy: Policy,
    tokenizer: Any,
    rollouts: Rollouts,
    log_probs: Tensor,
    apart: dict[str, float],
) -> None:
    """Raises UserError if engine and policy differ by more than verify.max_mismatch or verify.max_kl. A collective.

    log_probs [T]: the policy's; apart: their mismatch.
    """
    if _agree(config, apart):
        return
    cause = likely_cause(
        log_probs,
        rollouts,
        plain_log_probs=_log_probs(policy, rollouts, 1.0),
        precision=config.trainer.precision,
        quantization=config.generation.quantization,
    )
    worst = "; ".join(describe_token(tokenizer, token) for token in worst_tokens(log_probs, rollouts, 3))
    raise UserError(
        f"{_figures(config, apart)}; worst: {worst}; likely cause: {cause}; to go on all the same, raise the limits"
    )


def describe_token(tokenizer: Any, token: Token) -> str:
    """A token on which the engines differ, for a message."""
    text = tokenizer.decode([token.token])
    return (
        f"token {token.token} ({text!r}), number {token.place} of response {token.response}: "
        f"trainer {token.trainer:.4f}, engine {token.engine:.4f}"
    )


def _agree(config: RunConfig, apart: dict[str, float]) -> bool:
    """Not so for nan."""
    verify = config.verify
    return apart["mismatch/mean_exp_abs"] <= verify.max_mismatch and apart["mismatch/kl_k3"] <= verify.max_kl


def _figures(config: RunConfig, apart: dict[str, float]) -> str:
    return (
        f"trainer and engine {config.generation.engine} disagree: mean e^|d| {apart['mismatch/mean_exp_abs']:.4g} "
        f"(verify.max_mismatch={config.verify.max_mismatch:g}), KL {apart['mismatch/kl_k3']:.3g} "
        f"(verify.max_kl={config.verify.max_kl:g})"
    )


def _log_probs(policy: Policy, rollouts: Rollouts, temperature: float) -> Tensor:
    """[T] the policy's log-probs at another temperature. A collective."""
    before, policy.temperature = policy.temperature, temperature
    try:
        return policy.log_probs(rollouts)[0]
    finally:
        policy.temperature = before
