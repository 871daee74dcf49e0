"""Rollouts: the responses of one step, as one frozen, ragged, packed value (never padded).

Every rank holds the whole step's Rollouts and computes the same packing plan from it, so nothing is ever scattered
(1024 responses of 9k tokens are 74 MB). Pure data: touches neither the policy nor an engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.files import atomic_file
from nemo_disco.runtime.safetensor_writer import save_tensors
from nemo_disco.runtime.saved_files import check_file

PER_RESPONSE = (
    *("prompt_lengths", "response_lengths", "question_ids", "rewards"),
    *("correct", "truncated", "weight_versions"),
)
_COLUMN = "column/"  # before a column's name, in a file


@dataclass(frozen=True)
class Rollouts:
    """N responses, packed; T is the number of response tokens, S the number of tokens with prompts.

    tokens [S] int64: prompt then response, one response after another (a prompt is repeated for each response).
    prompt_lengths, response_lengths [N] int64: in tokens; a response length counts EOS if it was sampled, and may be 0.
    question_ids [N] int64: equal for responses to the same question.
    generation_log_probs [T] float32: the engine's own, on logits over the temperature; for comparison only.
    rewards [N] float64; correct [N] bool: the grader's verdict before any shaping.
    truncated [N] bool: the response was cut by the length limit (finish reason "length").
    weight_versions [N] int64: the policy version that sampled the response.
    max_response_length: the length limit under which they were sampled, in tokens.
    columns: further signals by name, [N] each, which an objective declares and reads (Objective.needs).
    routes [S, layers, K]: the experts of each token in the engine's pass, uint8 for up to 256 experts, else int16; 0
    for a response's last token, which the engine does not read. None where the engine was not asked for them.

    Raises ValueError for lengths that do not fit.
    """

    tokens: Tensor
    prompt_lengths: Tensor
    response_lengths: Tensor
    question_ids: Tensor
    generation_log_probs: Tensor
    rewards: Tensor
    correct: Tensor
    truncated: Tensor
    weight_versions: Tensor
    max_response_length: int
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    routes: Tensor | None = None

    def __post_init__(self) -> None:
        n = len(self.prompt_lengths)
        for name, values in ({name: getattr(self, name) for name in PER_RESPONSE} | dict(self.columns)).items():
            if len(values) != n:
                raise ValueError(f"rollouts: {name} has {len(values)} entries for {n} responses")
        total = int((self.prompt_lengths + self.response_lengths).sum())
        if len(self.tokens) != total:
            raise ValueError(f"rollouts: {len(self.tokens)} tokens, but the lengths add up to {total}")
        if self.routes is not None and len(self.routes) != total:
            raise ValueError(f"rollouts: routes of {len(self.routes)} tokens for {total} tokens")
        if len(self.generation_log_probs) != int(self.response_lengths.sum()):
            tokens = int(self.response_lengths.sum())
            raise ValueError(f"rollouts: {len(self.generation_log_probs)} log-probs for {tokens} response tokens")

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
        """Indices of the response tokens of `responses` (in that order) in a vector over all T response tokens."""
        return _ranges(self.response_offsets, responses)

    def sequence_index(self, responses: Sequence[int] | Tensor) -> Tensor:
        """Indices of all tokens of `responses` (in that order), prompts included, in `tokens`."""
        return _ranges(self.token_offsets, responses)

    def select(self, responses: Sequence[int] | Tensor) -> Rollouts:
        """The rollouts of some responses only, in the order given."""
        index = torch.as_tensor(responses, dtype=torch.int64)
        sequence = self.sequence_index(index)
        return replace(
            self,
            tokens=self.tokens[sequence],
            routes=None if self.routes is None else self.routes[sequence],
            generation_log_probs=self.generation_log_probs[_ranges(self.response_offsets, index)],
            columns={name: values[index] for name, values in self.columns.items()},
            **{name: getattr(self, name)[index] for name in PER_RESPONSE},
        )

    @classmethod
    def concatenate(cls, parts: Sequence[Rollouts]) -> Rollouts:
        """The responses of all parts, in order; the parts have the same limit and columns, and routes all or none."""
        names = [f.name for f in fields(cls) if isinstance(getattr(parts[0], f.name), Tensor)]
        return cls(
            **{name: torch.cat([getattr(part, name) for part in parts]) for name in names},
            max_response_length=parts[0].max_response_length,
            columns={name: torch.cat([part.columns[name] for part in parts]) for name in parts[0].columns},
        )

    @classmethod
    def pack(
        cls,
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int] | NDArray[np.int64]],
        log_probs: Sequence[Sequence[float] | NDArray[np.float32]],
        question_ids: Sequence[int],
        truncated: Sequence[bool],
        weight_versions: Sequence[int] | None = None,
        max_response_length: int | None = None,
        routes: Sequence[NDArray[np.uint8 | np.int16]] | None = None,
    ) -> Rollouts:
        """Rollouts of N prompts and responses as token ids; rewards are 0 until `with_rewards`.

        weight_versions: None for 0. max_response_length: None for the longest response's. routes: as in Response.
        """
        n, lengths = len(prompts), [len(response) for response in responses]
        parts = [part for pair in zip(prompts, responses, strict=True) for part in pair]
        return cls(
            tokens=_joined(parts, torch.int64),
            prompt_lengths=torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int64),
            response_lengths=torch.tensor(lengths, dtype=torch.int64),
            question_ids=torch.tensor(question_ids, dtype=torch.int64),
            generation_log_probs=_joined(log_probs, torch.float32),
            rewards=torch.zeros(n, dtype=torch.float64),
            correct=torch.zeros(n, dtype=torch.bool),
            truncated=torch.tensor(truncated, dtype=torch.bool),
            weight_versions=torch.tensor(weight_versions or [0] * n, dtype=torch.int64),
            max_response_length=max_response_length or max([1, *lengths]),
            routes=None if routes is None else _with_last_tokens(routes),
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

    def with_columns(self, columns: Mapping[str, Tensor]) -> Rollouts:
        """The same rollouts with further columns, [N] each."""
        return replace(self, columns={**self.columns, **columns})

    def save(self, path: str | Path) -> None:
        """Write as safetensors, whole or not at all. Raises UserError if it cannot be written."""
        tensors = {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}
        tensors["correct"], tensors["truncated"] = self.correct.to(torch.uint8), self.truncated.to(torch.uint8)
        tensors["max_response_length"] = torch.tensor([self.max_response_length])
        tensors |= {_COLUMN + name: values for name, values in self.columns.items()}
        with atomic_file(Path(path)) as work:
            save_tensors(tensors, work)

    @classmethod
    def load(cls, path: str | Path, vocabulary: int | None = None) -> Rollouts:
        """Read a file that `save` wrote.

        Raises UserError if it is another file, or has impossible values: tokens outside the `vocabulary` (the ids that
        the model may sample), negative lengths, numbers that are not finite.
        """
        check_file(path, links=True)
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            tensors["correct"], tensors["truncated"] = tensors["correct"].bool(), tensors["truncated"].bool()
            _refuse_impossible(tensors, vocabulary)
            columns = {name: tensors.pop(name) for name in list(tensors) if name.startswith(_COLUMN)}
            return cls(
                max_response_length=int(tensors.pop("max_response_length")),
                columns={name.removeprefix(_COLUMN): values for name, values in columns.items()},
                **tensors,
            )
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{path}: not a rollouts file ({error}); remove it to sample anew") from None


def _refuse_impossible(tensors: dict[str, Tensor], vocabulary: int | None) -> None:
    """Raises ValueError naming the tensor and its first bad entry."""
    dtypes = {"generation_log_probs": torch.float32, "rewards": torch.float64}
    dtypes |= {"correct": torch.bool, "truncated": torch.bool}
    least = dict.fromkeys(("prompt_lengths", "max_response_length"), 1) | dict.fromkeys(
        ("tokens", "response_lengths", "routes"), 0
    )
    for name, tensor in tensors.items():
        dtype = tensor.dtype if name.startswith(_COLUMN) else dtypes.get(name, torch.int64)
        dimensions = 1
        if name == "routes":
            dtype, dimensions = torch.uint8 if tensor.dtype == torch.uint8 else torch.int16, 3
        if tensor.dtype != dtype or tensor.dim() != dimensions:
            raise ValueError(f"{name} is {tensor.dtype} of {tensor.dim()} dimensions, not {dtype} of {dimensions}")
        bad = ~tensor.isfinite()
        if name in least:
            bad |= tensor < least[name]
        if name == "tokens" and vocabulary is not None:
            bad |= tensor >= vocabulary
        if bad.any():
            at = tuple(bad.nonzero()[0].tolist())
            raise ValueError(f"{name}[{', '.join(map(str, at))}] is {tensor[at].item():g}")
    if not len(tensors["generation_log_probs"]):
        raise ValueError("no response in it has a token")


def _joined(parts: Sequence[Any], dtype: torch.dtype) -> Tensor:
    arrays = [np.asarray(part) for part in parts if len(part)]
    return torch.as_tensor(np.concatenate(arrays) if arrays else [], dtype=dtype)


def _with_last_tokens(routes: Sequence[NDArray[np.uint8 | np.int16]]) -> Tensor:
    """[S, layers, K] the routes of all tokens: those given, and 0 for the last token of each response."""
    last = np.zeros_like(routes[0][:1])
    return torch.from_numpy(np.concatenate([part for rows in routes for part in (rows, last)]))


def _offsets(lengths: Tensor) -> Tensor:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def _ranges(offsets: Tensor, rows: Sequence[int] | Tensor) -> Tensor:
    """The concatenated index ranges [offsets[i], offsets[i + 1]) for i in rows."""
    index = torch.as_tensor(rows, dtype=torch.int64)
    starts, lengths = offsets[index], offsets[index + 1] - offsets[index]
    within = torch.arange(int(lengths.sum())) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    return starts.repeat_interleave(lengths) + within
