"""The texts of an engine's responses, each decoded once, and the packing of the responses into rollouts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, overload

from nemo_disco.data.chat import decode
from nemo_disco.data.rollouts import Rollouts
from nemo_disco.generation.engine import Response
from nemo_disco.rollout.prompts import PromptSet


class ResponseTexts(Sequence[str]):
    """The texts of responses, without the token that ended each. A text is decoded when it is first read."""

    def __init__(self, tokenizer: Any, size: int) -> None:
        self._tokenizer = tokenizer
        self._responses: list[Response | None] = [None] * size
        self._texts: dict[int, str] = {}

    def add(self, index: int, response: Response) -> None:
        """Set the response at `index`."""
        self._responses[index] = response

    def fill(self, responses: Sequence[Response]) -> None:
        """Set all responses, in order; texts that are decoded already stay."""
        self._responses = list(responses)

    def select(self, rows: Iterable[int]) -> ResponseTexts:
        return self._gather([(self, i) for i in rows])

    @staticmethod
    def join(parts: Sequence[ResponseTexts]) -> ResponseTexts:
        return parts[0]._gather([(part, i) for part in parts for i in range(len(part))])

    def _gather(self, sources: list[tuple[ResponseTexts, int]]) -> ResponseTexts:
        gathered = ResponseTexts(self._tokenizer, 0)
        gathered._responses = [part._responses[i] for part, i in sources]
        gathered._texts = {row: part._texts[i] for row, (part, i) in enumerate(sources) if i in part._texts}
        return gathered

    def __len__(self) -> int:
        return len(self._responses)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        if index not in self._texts:
            response = self._responses[index]
            assert response is not None, "the response has not been added"
            tokens = response.tokens[:-1] if response.finish_reason == "stop" else response.tokens
            self._texts[index] = decode(self._tokenizer, tokens.tolist())
        return self._texts[index]


def pack_responses(prompts: PromptSet, responses: Sequence[Response], max_response_length: int) -> Rollouts:
    """Rollouts of one response a prompt, not rewarded yet. max_response_length: the request's limit, in tokens."""
    routes = [r.routes for r in responses if r.routes is not None]
    return Rollouts.pack(
        prompts.prompts,
        [r.tokens for r in responses],
        [r.log_probs for r in responses],
        [q.id for q in prompts.questions],
        [r.finish_reason == "length" for r in responses],
        [r.weight_version for r in responses],
        max_response_length,
        routes=routes or None,
    )
