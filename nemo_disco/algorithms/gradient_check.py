"""One mini-batch on the present layout: compares engine and trainer, and computes the gradient.

The same rollouts and the same perturbation at every layout, so that gradients saved by several can be compared.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from nemo_disco.algorithms.agreement import Agreement, describe_token
from nemo_disco.algorithms.mismatch import noise_warning, worst_tokens
from nemo_disco.algorithms.network_check import compare_with_transformers
from nemo_disco.algorithms.objectives import Objective
from nemo_disco.algorithms.step import PROVIDED, OldValues, accumulate_gradient, noise_floor
from nemo_disco.config.schema import VerifyConfig
from nemo_disco.data.rollouts import Rollouts
from nemo_disco.models.weight_files import SafetensorReader
from nemo_disco.policy.policy import Policy
from nemo_disco.runtime.collectives import is_first_rank, on_first_rank
from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.files import atomic_file
from nemo_disco.runtime.safetensor_writer import save_tensors


def verify_mini_batch(
    config: VerifyConfig,
    policy: Policy,
    objective: Objective,
    agreement: Agreement,
    sample: Callable[[], Rollouts],
    seed: int,
) -> str:
    """Sample one mini-batch (or read verify.rollouts), move theta by verify.perturb, take the gradient, and write it to
    verify.save_gradients.

    sample: makes the rollouts of the mini-batch, a collective. seed: of the perturbation.
    Returns the lines to print, the same on every rank. Raises UserError if engine and trainer disagree, or the network
    and transformers' (verify.reference). A collective.
    """
    rollouts = _read_or_sample(config.rollouts, policy, objective, sample)
    network = compare_with_transformers(policy, rollouts) if config.reference else None
    old = OldValues.compute(policy, objective, rollouts, reference=None)
    old_log_probs = old.log_probs
    difference = agreement.require_agreement(rollouts, old_log_probs)
    noise = _noise_floor(policy, objective, rollouts, old)
    if config.perturb > 0:
        with SafetensorReader(policy.config.path) as reader:
            policy.load(_add_noise(reader.read, config.perturb, seed))
    old = replace(old, reference_log_probs=old_log_probs)  # the reference is the model from before the perturbation
    result = accumulate_gradient(policy, objective, rollouts, old, everywhere=True)
    gradients = {n: g.detach().cpu().clone() for n, g in policy.named_gradients()}
    if config.save_gradients and is_first_rank():
        with atomic_file(Path(config.save_gradients)) as work:
            save_tensors(gradients, work)
    warning = noise_warning(noise, objective.constraint)
    norm = float(torch.stack([g.double().square().sum() for g in gradients.values()]).sum().sqrt())
    lines = [
        f"responses           {len(rollouts)} to {len(set(rollouts.question_ids.tolist()))} questions, "
        f"{int(rollouts.response_lengths.sum())} response tokens",
        *([f"transformers        {network}"] if network else []),
        f"reward/mean         {float(rollouts.rewards.mean()):.4f}",
        *_mismatch_lines(agreement.tokenizer, rollouts, old_log_probs, difference),
        f"noise floor         {noise:.3e}  (KL_hat at theta = theta_old)",
        *([f"warning             {warning}"] if warning else []),
        *(f"{name:<19} {value:.6g}" for name, value in sorted(result.metrics.items())),
        f"gradient norm       {norm:.9g} over {len(gradients)} tensors",
    ]
    return "\n".join(lines)


def check_output_directories(verify: VerifyConfig) -> None:
    """Raises UserError if the directory of a file that is to be written does not exist."""
    for key in ("rollouts", "save_gradients"):
        path = getattr(verify, key)
        if path and not Path(path).absolute().parent.is_dir():
            raise UserError(f"verify.{key}={path}: there is no directory {Path(path).absolute().parent}; make it")


def _read_or_sample(file: str | None, policy: Policy, objective: Objective, sample: Callable[[], Rollouts]) -> Rollouts:
    """The rollouts of the file if it is there; else new ones, which are written to it."""
    path = Path(file) if file else None
    if path is not None and on_first_rank(path.exists):
        rollouts = Rollouts.load(path, policy.vocabulary)
        if missing := sorted(objective.needs - PROVIDED - rollouts.columns.keys()):
            raise UserError(
                f"verify.rollouts={path}: the file has no {' and '.join(missing)}, which objective {objective.name} "
                "needs; remove it to sample anew"
            )
        return rollouts
    rollouts = sample()
    if path is not None and is_first_rank():
        rollouts.save(path)
    return rollouts


def _mismatch_lines(
    tokenizer: object, rollouts: Rollouts, old_log_probs: Tensor, difference: dict[str, float]
) -> list[str]:
    return [
        f"mismatch mean |d|   {difference['mismatch/mean_abs']:.3e}  (log-probs, trainer minus engine)",
        f"mismatch max |d|    {difference['mismatch/max_abs']:.3e}",
        f"mismatch mean e^|d| {difference['mismatch/mean_exp_abs']:.6f}",
        f"mismatch KL         {difference['mismatch/kl_k3']:.3e}  (k3; k1 {difference['mismatch/kl_k1']:.3e})",
        *(
            f"mismatch worst      {describe_token(tokenizer, token)}"
            for token in worst_tokens(old_log_probs, rollouts, 3)
        ),
    ]


def _noise_floor(policy: Policy, objective: Objective, rollouts: Rollouts, old: OldValues) -> float:
    """|KL_hat| of the policy against itself, from log-probs computed again in other micro-batches: the KL that rounding
    alone makes at theta = theta_old. A collective."""
    recomputed = torch.empty_like(old.log_probs)
    for start in (0, 1):
        rows = torch.arange(start, len(rollouts), 2)
        if len(rows):
            values = policy.target_values(rollouts.select(rows), routes=old.select(rollouts, rows).routes)
            recomputed[rollouts.token_index(rows).to(recomputed.device)] = values.log_probs
    return noise_floor(objective, old.log_probs, recomputed)


def _add_noise(read: Callable[[str], Tensor], scale: float, seed: int) -> Callable[[str], Tensor]:
    """`read`, plus noise that depends on the seed and the tensor's name alone: the same at every layout."""

    def noisy(name: str) -> Tensor:
        tensor = read(name).double()
        generator = torch.Generator().manual_seed(seed * 2**32 + zlib.crc32(name.encode()))
        return tensor + scale * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)

    return noisy
