"""The gate between the rollout engine and the policy: both must give the sampled tokens the same log-probs.

`verify` and the first step of `train` always stop at a disagreement; with an engine in a process of its own `evaluate`
and `train` also stop before they evaluate; a later step of `train` warns. Knows the policy and the engine by their
contracts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemo_disco.algorithms.mismatch import MismatchedToken, in_float32, likely_cause, mismatch, tokens_at, worst_tokens
from nemo_disco.config.schema import GenerationConfig, VerifyConfig
from nemo_disco.data.rollouts import Rollouts
from nemo_disco.generation.engine import Engine, SamplingParams
from nemo_disco.policy.policy import Policy
from nemo_disco.rollout.prompts import PromptSet
from nemo_disco.rollout.responses import pack_responses
from nemo_disco.runtime.errors import UserError

# verify.max_kl where it is null: nats a token.
_MAX_KL, _MAX_KL_BF16 = 1e-3, 1e-2
# Size of the probe before an evaluation: prompts, and tokens of each response.
_PROBE_PROMPTS, _PROBE_TOKENS = 16, 256


@dataclass(frozen=True, eq=False)
class Agreement:
    """Compares the log-probs of engine and policy for the same tokens, by verify.max_mismatch and verify.max_kl.

    dtype_setting: the key that decided the type of the policy's weights.
    """

    verify: VerifyConfig
    generation: GenerationConfig
    policy: Policy
    tokenizer: Any
    dtype_setting: str = "trainer.precision"

    def check_step(self, step: int, rollouts: Rollouts, old_log_probs: Tensor) -> str:
        """Compare the rollouts that the step after `step` steps trains on. old_log_probs [T]: the policy's.

        The first step of a run (step 0; not the first one after a resume) raises UserError if engine and policy
        disagree, or if any log-prob of either is not finite. For a later step it returns a one-line warning, else "". A
        collective.

        A later step is not compared if a log-prob of the policy is not finite (its mini-batches are skipped) or if a
        response was sampled from older weights (its log-probs differ by what training changed). So an asynchronous run
        compares its first step and the first one after a resume. Groups that dynamic sampling dropped are left out.
        """
        if step == 0:
            self.require_agreement(rollouts, old_log_probs)
            return ""
        if not bool(old_log_probs.isfinite().all()) or int(rollouts.weight_versions.min()) < step:
            return ""
        difference = mismatch(old_log_probs, rollouts.generation_log_probs)
        if self._within_limits(difference):
            return ""
        return f"step {step + 1}: warning: {self._describe(difference)}; see nemo-disco verify"

    def check_engine(self, engine: Engine, prompts: PromptSet, temperature: float) -> None:
        """Sample short responses to a few prompts, and raise UserError if engine and policy disagree on the log-probs
        of their tokens. Afterwards the engine has the policy's weights and is ready. A collective.

        The embedded engine is not probed: it has no process, version or weights of its own, and a run's first step
        compares it anyway.
        """
        if self.generation.engine == "megatron":
            return
        prompts = prompts.select(range(min(_PROBE_PROMPTS, len(prompts))))
        # The whole distribution: under top-p some engines' log-probs are of the truncated one.
        limit = min(_PROBE_TOKENS, self.generation.longest_response)
        sampling = SamplingParams(temperature, limit, routes=self.policy.config.moe_router_replay == "engine")
        responses = engine.generate(prompts.prompts, range(len(prompts)), sampling)
        rollouts = pack_responses(prompts, responses, sampling.max_response_length)
        engine.sleep()  # as in a training step: an engine on the training GPUs leaves the policy no room beside it
        self.require_agreement(rollouts, self._log_probs(rollouts, temperature))
        engine.wake()
        engine.update_weights(self.policy.named_weights, int(rollouts.weight_versions.min()))

    def require_agreement(self, rollouts: Rollouts, log_probs: Tensor) -> dict[str, float]:
        """The mismatch of the engine's log-probs to the policy's, log_probs [T]. A collective.

        Raises UserError if a log-prob of either is not finite, whatever the limits, or if they differ by more than the
        limits (kl_limit).
        """
        self._refuse_non_finite(rollouts, log_probs)
        difference = mismatch(log_probs, rollouts.generation_log_probs)
        if self._within_limits(difference):
            return difference
        cause = likely_cause(
            log_probs,
            rollouts,
            plain_log_probs=self._log_probs(rollouts, 1.0),
            dtype=self.policy.dtype,
            setting=self.dtype_setting,
            quantization=self.generation.quantization,
        )
        worst = "; ".join(describe_token(self.tokenizer, token) for token in worst_tokens(log_probs, rollouts, 3))
        raise UserError(
            f"{self._describe(difference)}; worst: {worst}; likely cause: {cause}; to continue anyway, raise the limits"
        )

    def kl_limit(self) -> tuple[float, str]:
        """The largest KL that passes, and the setting that it comes from, for a message.

        A missing q/k norm, bias or rope costs 0.1 nats a token and more. Two correct implementations of a real model
        differ by about 1e-3 where they round to bfloat16. An engine that quantizes is held to the strict limit in any
        precision: it samples from other weights, which a user must allow explicitly.
        """
        max_kl, quantization, dtype = self.verify.max_kl, self.generation.quantization, self.policy.dtype
        if max_kl is not None:
            return max_kl, f"verify.max_kl={max_kl:g}"
        if dtype is not torch.bfloat16:
            return _MAX_KL, f"verify.max_kl=null: {_MAX_KL:g} in {str(dtype)[6:]}"
        if quantization is not None:
            return _MAX_KL, f"verify.max_kl=null: {_MAX_KL:g} with generation.quantization={quantization}"
        return _MAX_KL_BF16, f"verify.max_kl=null: {_MAX_KL_BF16:g} in bfloat16, for its rounding"

    def _refuse_non_finite(self, rollouts: Rollouts, log_probs: Tensor) -> None:
        """Raises UserError if a log-prob of the policy or the engine is not finite, which no limit can bound."""
        policy, engine = self.policy, f"engine {self.generation.engine}"
        for owner, values in (("policy", log_probs), (engine, rollouts.generation_log_probs)):
            bad = (~values.isfinite()).nonzero()[:, 0].tolist()
            if not bad:
                continue
            [first] = tokens_at(log_probs, rollouts, bad[:1])
            token = describe_token(self.tokenizer, first)
            if owner != "policy":
                hint = "look at its version and generation.options"
            elif policy.dtype is torch.bfloat16:
                hint = f"its weights overflow in bfloat16: try {in_float32(self.dtype_setting)}"
            else:
                hint = f"its weights overflow in {str(policy.dtype)[6:]}: look at model.path={policy.config.path}"
            raise UserError(f"the {owner} gives {len(bad)} of {len(values)} tokens no finite log-prob: {token}; {hint}")

    def _within_limits(self, difference: dict[str, float]) -> bool:
        """True if the mismatch passes verify.max_mismatch and kl_limit; False for nan."""
        limit, _ = self.kl_limit()
        return difference["mismatch/mean_exp_abs"] <= self.verify.max_mismatch and difference["mismatch/kl_k3"] <= limit

    def _describe(self, difference: dict[str, float]) -> str:
        _, limit = self.kl_limit()
        return (
            f"trainer and engine {self.generation.engine} disagree: mean e^|d| "
            f"{difference['mismatch/mean_exp_abs']:.4g} (verify.max_mismatch={self.verify.max_mismatch:g}), "
            f"KL {difference['mismatch/kl_k3']:.3g} ({limit})"
        )

    def _log_probs(self, rollouts: Rollouts, temperature: float) -> Tensor:
        """[T] the policy's log-probs at another temperature, over the experts that a step would take. A collective."""
        before, self.policy.temperature = self.policy.temperature, temperature
        try:
            return self.policy.target_values(rollouts, routes=self.policy.router_replay(rollouts)).log_probs
        finally:
            self.policy.temperature = before


def describe_token(tokenizer: Any, token: MismatchedToken) -> str:
    """Token, place and both log-probs, for a message."""
    text = tokenizer.decode([token.token])
    return (
        f"token {token.token} ({text!r}), number {token.place} of response {token.response}: "
        f"trainer {token.trainer:.4f}, engine {token.engine:.4f}"
    )
