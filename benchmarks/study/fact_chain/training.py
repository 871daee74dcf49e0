"""Reinforcement learning of a fact-chain policy by one of nemo_disco's objectives, and its evaluation.

A mini-batch is trained in the two passes of nemo_disco/algorithms/step.py: log-probs, then the objective's weights,
then the gradient of a linear loss. The policy is small, so the second pass uses the first one's graph.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from nemo_disco.algorithms import MiniBatch, NonFiniteError, Objective
from nemo_disco.policy.likely_tokens import LikelyTokens, token_divergences

from .policy import FactPolicy, Samples, sample
from .task import SYMBOLS, Questions


@dataclass(frozen=True)
class Settings:
    """Sizes and optimizer of a training; `points`: values in a curve, each a mean over steps / points steps."""

    steps: int
    questions: int  # of a step
    mini_batch_questions: int
    responses: int  # to each question
    warmup: int
    betas: tuple[float, float]
    clip: float  # of the gradient's norm
    points: int


@dataclass(frozen=True, eq=False)
class Tokens:
    """The T asked tokens of N responses, response after response: `symbols`, `terms`, `next` [T]; `lengths` [N]."""

    symbols: Tensor
    terms: Tensor
    next: Tensor
    lengths: Tensor


def pack(samples: Samples, questions: Questions, each: int) -> Tokens:
    """The tokens of the responses without padding; `each` responses to each question."""
    asked = questions.asked.repeat_interleave(each, 0)
    return Tokens(samples.symbols[asked], samples.terms[asked], samples.next[asked], asked.sum(1))


def compute_divergences(old: Tensor, new: Tensor, likely: int) -> Tensor:
    """[T] KL(old || new) over old's `likely` most likely symbols and one bucket of all others, from log-probs [T, S].

    With `likely` = S there is no bucket, and the value is the exact KL.
    """
    if likely == old.shape[-1]:
        every = torch.arange(likely, dtype=torch.int32).expand(old.shape)
        return token_divergences(new, LikelyTokens(every, old, complete=True))
    top = old.topk(likely, -1)
    return token_divergences(new.gather(-1, top.indices), LikelyTokens(top.indices.int(), top.values, complete=False))


def accumulate_gradient(
    policy: FactPolicy, objective: Objective, old: Tensor, tokens: Tokens, right: Tensor, each: int
) -> Mapping[str, float]:
    """Add the gradient of the objective's loss on one mini-batch to the policy's; returns the objective's metrics.

    old: the table of log-probs of the policy that sampled. right [N] bool, `each` responses to each question.
    Raises NonFiniteError if log-probs or loss are not finite.
    """
    old_rows, rows = old[tokens.symbols, tokens.terms], policy(tokens.symbols, tokens.terms)
    log_probs = rows.gather(-1, tokens.next[:, None])[:, 0]
    likely = objective.constraint.likely_tokens
    divergences = compute_divergences(old_rows, rows, min(likely, SYMBOLS)) if likely else None
    out = objective(
        MiniBatch(
            log_probs=log_probs.detach(),
            old_log_probs=old_rows.gather(-1, tokens.next[:, None])[:, 0],
            lengths=tokens.lengths,
            question_ids=torch.arange(len(right) // each).repeat_interleave(each),
            rewards=right.double(),
            max_response_length=int(tokens.lengths.max()),
            divergences=None if divergences is None else divergences.detach(),
        )
    )
    loss = (out.token_weights.to(log_probs.dtype) * log_probs).sum()
    if out.divergence_weights is not None and divergences is not None:
        loss = loss + (out.divergence_weights.to(divergences.dtype) * divergences).sum()
    loss.backward()
    return out.metrics


class Training:
    """Training of a copy of a start's policy. `run` takes all steps; `policy`, `curves`, `never_solved` are results."""

    def __init__(
        self,
        start: FactPolicy,
        objective: Objective,
        learning_rate: float,
        questions: Questions,
        settings: Settings,
        seed: int,
    ) -> None:
        """seed: of the questions' order and of the samples."""
        self.policy, self.objective, self.learning_rate = copy.deepcopy(start), objective, learning_rate
        self.questions, self.settings, self.rng = questions, settings, torch.Generator().manual_seed(seed)
        self.optimizer = torch.optim.AdamW(
            self.policy.parameters(), learning_rate, betas=settings.betas, weight_decay=0.0, fused=True
        )
        self.table = self.policy.table()
        self.asked, self.solved = torch.zeros(len(questions)), torch.zeros(len(questions))
        self.history: list[dict[str, float]] = []

    def run(self) -> int | None:
        """Take all steps; the number of the step in which the policy diverged, None if it did not."""
        order = self._draw_steps()
        for step in range(1, self.settings.steps + 1):
            self.optimizer.param_groups[0]["lr"] = self.learning_rate * min(1.0, step / self.settings.warmup)
            try:
                self._take_step(next(order))
            except NonFiniteError:
                return step
        return None

    @property
    def never_solved(self) -> float:
        """The share of the questions asked so far that never had a right response."""
        return float(((self.asked > 0) & (self.solved == 0)).sum() / (self.asked > 0).sum().clamp(min=1))

    def curves(self) -> dict[str, list[float]]:
        """The metrics of the steps by name, as settings.points means over as many steps each."""
        size = max(1, len(self.history) // self.settings.points)
        parts = [self.history[i : i + size] for i in range(0, len(self.history), size)]
        names = self.history[0] if self.history else ()
        return {name: [float(f"{_mean(step[name] for step in part):.5g}") for part in parts] for name in names}

    def _draw_steps(self) -> Iterator[Tensor]:
        """Endless steps' questions, as indices: every question once in a random order, and again."""
        size, waiting = self.settings.questions, torch.empty(0, dtype=torch.long)
        while True:
            while len(waiting) < size:
                waiting = torch.cat([waiting, torch.randperm(len(self.questions), generator=self.rng)])
            yield waiting[:size]
            waiting = waiting[size:]

    def _take_step(self, index: Tensor) -> None:
        """Sample responses to the questions at `index`, update on each mini-batch, and note the step's metrics."""
        each, questions = self.settings.responses, self.questions.select(index)
        samples = sample(self.table, questions, each, self.rng)
        updates = []
        for rows in torch.split(torch.arange(len(index)), self.settings.mini_batch_questions):
            responses = (rows[:, None] * each + torch.arange(each)).flatten()
            tokens = pack(samples.select(responses), questions.select(rows), each)
            self.optimizer.zero_grad()
            updates.append(
                accumulate_gradient(self.policy, self.objective, self.table, tokens, samples.right[responses], each)
            )
            nn.utils.clip_grad_norm_(self.policy.parameters(), self.settings.clip)
            self.optimizer.step()
        right = samples.right.view(-1, each).sum(1)
        self.asked[index] += 1
        self.solved[index] += right
        old, self.table = self.table, self.policy.table()
        everything = pack(samples, questions, each)
        place = (everything.symbols, everything.terms)
        self.history.append(
            {
                "reward": float(samples.right.double().mean()),
                "all_wrong": float((right == 0).double().mean()),
                "all_right": float((right == each).double().mean()),
                "entropy": float(-(old.exp() * old).sum(-1)[place].mean()),
                "kl_after": float((old.exp() * (old - self.table)).sum(-1)[place].mean()),
                "constraint_kl": _mean(m["constraint/kl"] for m in updates),
                "active": _mean(m["constraint/active"] for m in updates),
            }
        )


def evaluate(policy: FactPolicy, questions: Questions, samples: int, seed: int) -> list[int]:
    """The number of right responses among `samples` to each question."""
    rng = torch.Generator().manual_seed(seed)
    counts: list[int] = sample(policy.table(), questions, samples, rng).right.view(-1, samples).sum(1).tolist()
    return counts


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))
