"""Rollouts: what one step sampled, as one frozen, ragged, packed value (never padded).

Every rank holds the whole step's Rollouts and computes the same packing plan from it, so nothing is ever scattered
(1024 responses of 9k tokens are 74 MB). Pure data: touches neither the policy nor an engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.files import atomic_file
from nemo_disco.runtime.safetensor_writer import save_tensors
from nemo_disco.runtime.saved_files import check_file

PER_RESPONSE = (
    *("prompt_lengths", "response_lengths", "question_ids", "rewards"),
    *("correct", "truncated", "preferences", "shortest_correct", "weight_versions"),
)


@dataclass(frozen=True)
class Rollouts:
    """N responses, packed; T is the number of response tokens, S the number of tokens with prompts.

    tokens [S] int64: prompt then response, one response after another (a prompt is repeated for each response).
    prompt_lengths, response_lengths [N] int64: in tokens; a response length counts EOS if it was sampled, and may be 0.
    question_ids [N] int64: which responses answer the same question.
    generation_log_probs [T] float32: the engine's own, on logits over the temperature; for comparison only.
    rewards [N] float64; correct [N] bool: the grader's verdict before any shaping.
    truncated [N] bool: the response was cut by the length limit (finish reason "length").
    preferences [N] float64: what DRPO weighs right answers by, where that is a reward term.
    shortest_correct [N] int64: tokens of the shortest right answer to the question in earlier steps, 0 if unknown.
    weight_versions [N] int64: the policy version that sampled the response.
    """

    tokens: Tensor
    prompt_lengths: Tensor
    response_lengths: Tensor
    question_ids: Tensor
    generation_log_probs: Tensor
    rewards: Tensor
    correct: Tensor
    truncated: Tensor
    preferences: Tensor
    shortest_correct: Tensor
    weight_versions: Tensor

    def __post_init__(self) -> None:
        n = len(self.prompt_lengths)
        for name in PER_RESPONSE:
            if len(getattr(self, name)) != n:
                raise ValueError(f"rollouts: {name} has {len(getattr(self, name))} entries for {n} responses")
        total = int((self.prompt_lengths + self.response_lengths).sum())
        if len(self.tokens) != total:
            raise ValueError(f"rollouts: {len(self.tokens)} tokens, but the lengths add up to {total}")
        if len(self.generation_log_probs) != int(self.response_lengths.sum()):
            raise ValueError(
                f"rollouts: {len(self.generation_log_probs)} log-probs "
                f"for {int(self.response_lengths.sum())} response tokens"
            )

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    @property
    def total_lengths(self) -> Tensor:
        """[N] prompt and response, in tokens."""
        return self.prompt_lengths + self.response_lengths

    @cached_property
    def token_offsets(self) -> Tensor:
        """[N + 1] where each response's prompt starts in `tokens`."""
        return _offsets(self.total_lengths)

    @cached_property
    def response_offsets(self) -> Tensor:
        """[N + 1] where each response starts in a vector over the T response tokens."""
        return _offsets(self.response_lengths)

    def prompt(self, i: int) -> Tensor:
        start = int(self.token_offsets[i])
        return self.tokens[start : start + int(self.prompt_lengths[i])]

    def response(self, i: int) -> Tensor:
        end = int(self.token_offsets[i + 1])
        return self.tokens[end - int(self.response_lengths[i]) : end]

    def token_index(self, responses: Sequence[int] | Tensor) -> Tensor:
        """Where the response tokens of `responses` (in that order) stand in a vector over all T response tokens."""
        return _ranges(self.response_offsets, responses)

    def select(self, responses: Sequence[int] | Tensor) -> Rollouts:
        """The rollouts of some responses only, in the order given."""
        index = torch.as_tensor(responses, dtype=torch.int64)
        per_token = {"tokens": self.token_offsets, "generation_log_probs": self.response_offsets}
        picked = {
            f.name: getattr(self, f.name)[_ranges(per_token[f.name], index) if f.name in per_token else index]
            for f in fields(self)
        }
        return replace(self, **picked)

    @classmethod
    def concatenate(cls, parts: Sequence[Rollouts]) -> Rollouts:
        """The responses of all parts, in order."""
        return cls(**{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(cls)})

    @classmethod
    def from_lists(
        cls,
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        log_probs: Sequence[Sequence[float]],
        question_ids: Sequence[int],
        truncated: Sequence[bool],
        weight_versions: Sequence[int] | None = None,
    ) -> Rollouts:
        """Pack what an engine returned; rewards are 0 until the grader has spoken (`with_rewards`).

        weight_versions: 0 where there is one policy alone.
        """
        flat = [t for p, r in zip(prompts, responses, strict=True) for t in (*p, *r)]
        n = len(prompts)
        return cls(
            tokens=torch.tensor(flat, dtype=torch.int64),
            prompt_lengths=torch.tensor([len(p) for p in prompts], dtype=torch.int64),
            response_lengths=torch.tensor([len(r) for r in responses], dtype=torch.int64),
            question_ids=torch.tensor(question_ids, dtype=torch.int64),
            generation_log_probs=torch.tensor([x for lp in log_probs for x in lp], dtype=torch.float32),
            rewards=torch.zeros(n, dtype=torch.float64),
            correct=torch.zeros(n, dtype=torch.bool),
            truncated=torch.tensor(truncated, dtype=torch.bool),
            preferences=torch.zeros(n, dtype=torch.float64),
            shortest_correct=torch.zeros(n, dtype=torch.int64),
            weight_versions=torch.tensor(weight_versions or [0] * n, dtype=torch.int64),
        )

    def with_rewards(self, rewards: Sequence[float], threshold: float = 0.5) -> Rollouts:
        """The same rollouts, graded; `correct` is reward > threshold.

        Raises ValueError naming the first response whose reward is not finite.
        """
        values = torch.tensor(rewards, dtype=torch.float64)
        bad = (~values.isfinite()).nonzero()
        if len(bad):
            i = int(bad[0])
            raise ValueError(
                f"reward of response {i} (question {int(self.question_ids[i])}) is {float(values[i])}; "
                "rewards must be finite"
            )
        return replace(self, rewards=values, correct=values > threshold)

    def save(self, path: str | Path) -> None:
        """Write as safetensors, whole or not at all. Raises UserError if it cannot be written."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors["correct"], tensors["truncated"] = self.correct.to(torch.uint8), self.truncated.to(torch.uint8)
        with atomic_file(Path(path)) as work:
            save_tensors(tensors, work)

    @classmethod
    def load(cls, path: str | Path, vocabulary: int | None = None) -> Rollouts:
        """Read what `save` wrote. Raises UserError if the file is not that, or holds what no rollouts can be: tokens
        outside the `vocabulary` (ids that the model may say), negative lengths, numbers that are not finite."""
        check_file(path, links=True)
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            tensors["correct"], tensors["truncated"] = tensors["correct"].bool(), tensors["truncated"].bool()
            _refuse_impossible(tensors, vocabulary)
            return cls(**tensors)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: not a rollouts file ({error}); remove it to sample anew") from None


def _refuse_impossible(tensors: dict[str, Tensor], vocabulary: int | None) -> None:
    """Raises ValueError naming the tensor and its first bad entry."""
    kinds = {"generation_log_probs": torch.float32, "rewards": torch.float64, "preferences": torch.float64}
    kinds |= {"correct": torch.bool, "truncated": torch.bool}
    least = {"prompt_lengths": 1} | dict.fromkeys(("tokens", "response_lengths", "shortest_correct"), 0)
    for name, tensor in tensors.items():
        kind = kinds.get(name, torch.int64)
        if tensor.dtype != kind or tensor.dim() != 1:
            raise ValueError(f"{name} is {tensor.dtype} of {tensor.dim()} dimensions, not {kind} of one")
        bad = ~tensor.isfinite()
        if name in least:
            bad |= tensor < least[name]
        if name == "tokens" and vocabulary is not None:
            bad |= tensor >= vocabulary
        if bad.any():
            at = int(bad.nonzero()[0])
            raise ValueError(f"{name}[{at}] is {tensor[at].item():g}")
    if not len(tensors["generation_log_probs"]):
        raise ValueError("no response in it has a token")


def _offsets(lengths: Tensor) -> Tensor:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def _ranges(offsets: Tensor, rows: Sequence[int] | Tensor) -> Tensor:
    """The concatenated index ranges [offsets[i], offsets[i + 1]) for i in rows."""
    index = torch.as_tensor(rows, dtype=torch.int64)
    starts, lengths = offsets[index], offsets[index + 1] - offsets[index]
    within = torch.arange(int(lengths.sum())) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    return starts.repeat_interleave(lengths) + within
