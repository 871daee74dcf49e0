"""PromptSet: questions with their prompts as token ids, the input of sampling and grading."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_disco.data.questions import Question


@dataclass(frozen=True)
class PromptSet:
    """Questions and their prompts as token ids (one a question), the set's name, and the tokenizer of the prompts."""

    name: str
    questions: Sequence[Question]
    prompts: Sequence[Sequence[int]]
    tokenizer: Any

    def __len__(self) -> int:
        return len(self.questions)

    def content(self) -> str:
        """A hash of the questions' texts, answers, weights and metadata."""
        digest = hashlib.sha256()
        for q in self.questions:
            fields = [[list(m) for m in q.messages], q.answers, q.weight, q.metadata]
            digest.update(json.dumps(fields, sort_keys=True, default=str).encode() + b"\n")
        return digest.hexdigest()

    def select(self, indices: Iterable[int], copies: int = 1) -> PromptSet:
        """The prompts at `indices`, in that order, each `copies` times in a row."""
        rows = [i for i in indices for _ in range(copies)]
        return PromptSet(self.name, [self.questions[i] for i in rows], [self.prompts[i] for i in rows], self.tokenizer)

    @staticmethod
    def join(parts: Sequence[PromptSet]) -> PromptSet:
        """The prompts of all parts, in order, under the first one's name."""
        questions = [q for part in parts for q in part.questions]
        prompts = [p for part in parts for p in part.prompts]
        return PromptSet(parts[0].name, questions, prompts, parts[0].tokenizer)
