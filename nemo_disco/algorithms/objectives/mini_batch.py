"""MiniBatch: one mini-batch's log-probs, packed, with the lengths, questions and rewards of its responses.

Pure tensors on one device, checked when made; knows no policy, no packing plan and no parallel layout. Axes: T response
tokens, N responses, Q questions, G the most responses of one question.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

_PER_TOKEN = (
    *("log_probs", "old_log_probs", "entropies", "divergences"),
    *("reference_log_probs", "generation_log_probs"),
)
_PER_RESPONSE = ("lengths", "question_ids", "rewards", "correct", "truncated")
_INTEGER = ("lengths", "question_ids")
_BOOL = ("correct", "truncated")


class NonFiniteError(ValueError):
    """A log-prob or entropy that is NaN or infinite, or a loss that overflows: the policy has diverged."""


@dataclass(frozen=True, eq=False)
class MiniBatch:
    """N responses in any order, to questions of any number of responses; T response tokens, of which there may be none.

    log_probs [T]: of the current policy, on logits over the temperature. old_log_probs [T]: of the policy that the step
    began with, by the trainer. lengths [N]: tokens, EOS included if sampled, may be 0. question_ids [N]: any integers.
    rewards [N]: finite. max_response_length: the configured limit in tokens.
    entropies [T]; reference_log_probs [T]; generation_log_probs [T]: the rollout engine's own. divergences [T]: the KL
    of old to the current policy at each token's place, over old's likeliest tokens and one bucket of all others.
    correct [N] bool: the grader's verdict before any shaping (else an objective takes rewards > its threshold).
    truncated [N] bool: cut by the length limit. columns: further signals by name, [N] each (Objective.needs).

    Raises ValueError for shapes and types that do not fit and for a reward that is not finite, naming the response;
    NonFiniteError for a log-prob or entropy that is not finite, naming its token.
    """

    log_probs: Tensor
    old_log_probs: Tensor
    lengths: Tensor
    question_ids: Tensor
    rewards: Tensor
    max_response_length: int
    entropies: Tensor | None = None
    divergences: Tensor | None = None
    reference_log_probs: Tensor | None = None
    generation_log_probs: Tensor | None = None
    correct: Tensor | None = None
    truncated: Tensor | None = None
    columns: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check_shapes()
        self._check_types()
        if int(self.lengths.min()) < 0:
            i = int(self.lengths.argmin())
            raise ValueError(f"mini-batch: response {i} has length {int(self.lengths[i])}; lengths are 0 or more")
        if (total := int(self.lengths.sum())) != len(self.log_probs):
            raise ValueError(f"mini-batch: the lengths add up to {total}, not to the {len(self.log_probs)} log_probs")
        if self.max_response_length < 1:
            raise ValueError(f"mini-batch: max_response_length is {self.max_response_length}; it must be 1 or more")
        self._check_finite()

    def _check_shapes(self) -> None:
        sizes = dict.fromkeys(_PER_TOKEN, len(self.log_probs)) | dict.fromkeys(_PER_RESPONSE, len(self.lengths))
        sizes |= dict.fromkeys(self.columns, len(self.lengths))
        for name, size in sizes.items():
            value = self.get(name)
            if not isinstance(value, Tensor | None):
                raise ValueError(f"mini-batch: {name} must be a tensor; it is a {type(value).__name__}")
            if value is not None and tuple(value.shape) != (size,):
                unit = "log_probs" if name in _PER_TOKEN else "lengths"
                raise ValueError(f"mini-batch: {name} has shape {list(value.shape)}, but there are {size} {unit}")
        if not len(self.lengths):
            raise ValueError("mini-batch: no responses")

    def _check_types(self) -> None:
        for name in _PER_TOKEN + _PER_RESPONSE:
            value = getattr(self, name)
            kind = "bool" if name in _BOOL else "integers" if name in _INTEGER else "floating point"
            if value is not None and name != "rewards" and _kind(value) != kind:
                raise ValueError(f"mini-batch: {name} must be {kind}; it is {value.dtype}")

    def _check_finite(self) -> None:
        for name in ("rewards", *self.columns):
            if (i := _first_non_finite(value := self[name])) is not None:
                label, question = "the reward" if name == "rewards" else name, int(self.question_ids[i])
                raise ValueError(
                    f"mini-batch: {label} of response {i} (question {question}) is {float(value[i])}; "
                    f"{name} must be finite"
                )
        for name in _PER_TOKEN:
            value = getattr(self, name)
            # An engine that filters by top-p may report -inf; off_policy, which alone reads them, refuses it.
            if value is None or name == "generation_log_probs":
                continue
            if (t := _first_non_finite(value)) is not None:
                raise NonFiniteError(f"mini-batch: {name} is {float(value[t])} at {self.describe_token(t)}")

    def get(self, name: str) -> Tensor | None:
        """An optional field or a column; None if the mini-batch lacks it."""
        return self.columns[name] if name in self.columns else getattr(self, name, None)

    def __getitem__(self, name: str) -> Tensor:
        """An optional field or a column. Raises KeyError if the mini-batch lacks it."""
        if (value := self.get(name)) is None:
            raise KeyError(name)
        return value

    def describe_token(self, t: int) -> str:
        """The response, place and question of packed token t, for a message."""
        i = int((self.lengths.cumsum(0) <= t).sum())
        start = int(self.lengths[:i].sum())
        return f"token {t} (number {t - start} of response {i}, question {int(self.question_ids[i])})"

    def to_float64(self) -> MiniBatch:
        """A detached copy in float64, everything on the device of log_probs."""

        def copy(name: str, value: Tensor) -> Tensor:
            real = name in (*_PER_TOKEN, "rewards") or value.is_floating_point()
            return value.detach().to(self.log_probs.device, torch.float64 if real else None, copy=True)

        tensors = {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}
        copies: dict[str, Any] = {name: copy(name, value) for name, value in tensors.items()}
        return replace(self, **copies, columns={name: copy(name, value) for name, value in self.columns.items()})

    @property
    def n_tokens(self) -> int:
        """T, the number of response tokens."""
        return len(self.log_probs)

    def spread(self, per_response: Tensor) -> Tensor:
        """[N] to [T]: each token gets its response's value."""
        return per_response.repeat_interleave(self.lengths)

    def token_mean(self, per_token: Tensor) -> Tensor:
        """[T] to [N]: the mean over each response's tokens, 0 for an empty one."""
        return torch.segment_reduce(per_token, "sum", lengths=self.lengths.long()) / self.lengths.clamp(min=1)

    @cached_property
    def groups(self) -> Groups:
        """The responses, grouped by question."""
        return Groups.from_question_ids(self.question_ids)


@dataclass(frozen=True, eq=False)
class Groups:
    """Responses as a table of Q questions by G places, so that a reduction over a group is one over a row.

    row, place [N]: where each response stands. present [Q, G] bool: the places that hold a response.
    """

    row: Tensor
    place: Tensor
    present: Tensor

    @classmethod
    def from_question_ids(cls, question_ids: Tensor) -> Groups:
        """Group responses by question id; questions in the order of their ids, responses in the order given."""
        _, row, counts = torch.unique(question_ids, return_inverse=True, return_counts=True)
        by_question = row.argsort(stable=True)
        starts = counts.cumsum(0) - counts
        place = torch.empty_like(row)
        place[by_question] = torch.arange(len(row), device=row.device) - starts[row[by_question]]
        present = torch.arange(int(counts.max()), device=row.device) < counts[:, None]
        return cls(row, place, present)

    def __len__(self) -> int:
        """Q: all questions, also those whose responses are all right, all wrong or all empty."""
        return len(self.present)

    def table(self, per_response: Tensor) -> Tensor:
        """[N] to [Q, G]; places without a response hold 0 (False)."""
        return per_response.new_zeros(self.present.shape).index_put((self.row, self.place), per_response)

    def flat(self, table: Tensor) -> Tensor:
        """[Q, G] to [N], the inverse of `table`."""
        return table[self.row, self.place]


def _kind(values: Tensor) -> str:
    if values.dtype == torch.bool:
        return "bool"
    return "floating point" if values.is_floating_point() else "integers"


def _first_non_finite(values: Tensor) -> int | None:
    bad = (~values.isfinite()).nonzero()
    return int(bad[0]) if len(bad) else None
