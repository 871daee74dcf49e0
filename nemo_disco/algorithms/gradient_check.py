"""One mini-batch on the present layout: do engine and trainer agree, and what is the gradient.

The same rollouts and the same perturbation at every layout, so that gradients saved by several can be compared.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from nemo_disco.algorithms.agreement import describe_token, refuse_disagreement
from nemo_disco.algorithms.mismatch import mismatch, noise_warning, worst_tokens
from nemo_disco.algorithms.objectives import Objective
from nemo_disco.algorithms.step import OldPolicy, accumulate_gradient
from nemo_disco.config.schema import RunConfig, VerifyConfig
from nemo_disco.data.question_order import QuestionOrder
from nemo_disco.data.rollouts import Rollouts
from nemo_disco.generation.engine import Engine, SamplingParams
from nemo_disco.models.weight_files import SafetensorReader
from nemo_disco.policy.policy import Policy
from nemo_disco.rewards import Rewards
from nemo_disco.rewards.registry import Grader
from nemo_disco.rollout.grading import grade
from nemo_disco.rollout.prompts import PromptSet
from nemo_disco.rollout.requests import sample_responses
from nemo_disco.rollout.rewarding import reward
from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.files import atomic_file
from nemo_disco.runtime.safetensor_writer import save_tensors


def verify_mini_batch(
    config: RunConfig, policy: Policy, engine: Engine, grader: Grader, objective: Objective, questions: PromptSet
) -> str:
    """Sample (or read verify.rollouts), move theta by verify.perturb, take the gradient, write it if asked.

    Returns the lines to print, the same on every rank. A collective.
    """
    rollouts = _rollouts(config, engine, grader, questions, policy.vocabulary)
    old_log_probs, entropies = policy.log_probs(rollouts, entropies=True)
    apart = mismatch(old_log_probs, rollouts.generation_log_probs)
    refuse_disagreement(config, policy, questions.tokenizer, rollouts, old_log_probs, apart, "verify.dtype")
    noise = _noise_floor(policy, rollouts, old_log_probs)
    if config.verify.perturb > 0:
        with SafetensorReader(config.model.path) as reader:
            policy.load(_perturbed(reader.read, config.verify.perturb, config.seed))
    taken = accumulate_gradient(
        policy,
        objective,
        rollouts,
        OldPolicy(old_log_probs, entropies, reference_log_probs=old_log_probs),  # the reference is this very model
        max_response_length=config.generation.max_response_length,
        everywhere=True,
    )
    gradients = {n: g.detach().cpu().clone() for n, g in policy.named_gradients()}
    if config.verify.save_gradients and dist.get_rank() == 0:
        with atomic_file(Path(config.verify.save_gradients)) as work:
            save_tensors(gradients, work)
    norm = float(torch.stack([g.double().square().sum() for g in gradients.values()]).sum().sqrt())
    lines = [
        f"responses           {len(rollouts)} to {len(set(rollouts.question_ids.tolist()))} questions, "
        f"{int(rollouts.response_lengths.sum())} response tokens",
        f"reward/mean         {float(rollouts.rewards.mean()):.4f}",
        *_said(questions, rollouts, old_log_probs, apart),
        *_noise_said(noise, objective),
        *(f"{name:<19} {value:.6g}" for name, value in sorted(taken.metrics.items())),
        f"gradient norm       {norm:.9g} over {len(gradients)} tensors",
    ]
    return "\n".join(lines)


def check_places(verify: VerifyConfig) -> None:
    """Raises UserError if a file that is to be written has no directory to be in."""
    for key in ("rollouts", "save_gradients"):
        path = getattr(verify, key)
        if path and not Path(path).absolute().parent.is_dir():
            raise UserError(f"verify.{key}={path}: there is no directory {Path(path).absolute().parent}; make it")


def _said(questions: PromptSet, rollouts: Rollouts, old_log_probs: Tensor, apart: dict[str, float]) -> list[str]:
    return [
        f"mismatch mean |d|   {apart['mismatch/mean_abs']:.3e}  (log-probs, trainer minus engine)",
        f"mismatch max |d|    {apart['mismatch/max_abs']:.3e}",
        f"mismatch mean e^|d| {apart['mismatch/mean_exp_abs']:.6f}",
        f"mismatch KL         {apart['mismatch/kl_k3']:.3e}  (k3; k1 {apart['mismatch/kl_k1']:.3e})",
        *(
            f"mismatch worst      {describe_token(questions.tokenizer, token)}"
            for token in worst_tokens(old_log_probs, rollouts, 3)
        ),
    ]


def _noise_floor(policy: Policy, rollouts: Rollouts, old_log_probs: Tensor) -> float:
    """|KL_hat| of the policy against itself, when its responses are packed into other micro-batches: what rounding
    alone makes of theta = theta_old. A collective."""
    again = torch.empty_like(old_log_probs)
    for start in (0, 1):
        rows = torch.arange(start, len(rollouts), 2)
        if len(rows):
            again[rollouts.token_index(rows).to(again.device)] = policy.log_probs(rollouts.select(rows))[0]
    return abs(mismatch(again, old_log_probs)["mismatch/kl_k1"])


def _noise_said(noise: float, objective: Objective) -> list[str]:
    """The noise floor, and a warning where the constraint would act on it."""
    lines = [f"noise floor         {noise:.3e}  (KL_hat at theta = theta_old)"]
    warning = noise_warning(noise, objective.constraint)
    return [*lines, f"warning             {warning}"] if warning else lines


def _rollouts(config: RunConfig, engine: Engine, grader: Grader, questions: PromptSet, vocabulary: int) -> Rollouts:
    path = Path(config.verify.rollouts) if config.verify.rollouts else None
    exists = [path is not None and path.exists()]
    dist.broadcast_object_list(exists, src=0)
    if path is not None and exists[0]:
        return Rollouts.load(path, vocabulary)
    sampler = QuestionOrder(len(questions), config.algorithm.mini_batch_questions, config.seed, config.data.shuffle)
    picked = questions.select(sampler.next(), config.generation.responses_per_question)
    seeds = np.random.SeedSequence((config.seed, 0)).generate_state(len(picked), np.uint64) >> 1
    generation = config.generation
    sampling = SamplingParams(
        generation.temperature, generation.max_response_length, generation.top_p, generation.top_k
    )
    rollouts, texts = sample_responses(engine, picked, [int(s) for s in seeds], sampling)
    with closing(Rewards(config.reward, config.algorithm.preference)) as rewards:
        rollouts = reward(
            rollouts,
            texts,
            picked,
            verdicts=grade(grader, texts, picked),
            rewards=rewards,
            threshold=config.algorithm.threshold,
            max_response_length=generation.max_response_length,
        )
    if path is not None and dist.get_rank() == 0:
        rollouts.save(path)
    return rollouts


def _perturbed(read: Callable[[str], Tensor], scale: float, seed: int) -> Callable[[str], Tensor]:
    """`read`, with noise that depends on the seed and the tensor's name alone: the same at every layout."""

    def noisy(name: str) -> Tensor:
        tensor = read(name).double()
        generator = torch.Generator().manual_seed(seed * 2**32 + zlib.crc32(name.encode()))
        return tensor + scale * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)

    return noisy
