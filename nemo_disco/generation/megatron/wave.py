"""State of one wave of requests in the megatron engine: the rows of the batch, and their responses.

A row is one request; a response is built and passed to the `deliver` callback once its row has ended. Knows no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_disco.generation.engine import Deliver, Response

# Rows leave the batch only when fewer than this share are still sampling: dropping rows copies the whole cache.
COMPACT_BELOW = 0.8


@dataclass
class Rows:
    """The B rows still in the batch, as tensors [B]: place in the wave, seed, number of padding tokens before the
    prompt, last token, and True if the response has ended."""

    request: Tensor
    seeds: Tensor
    padding: Tensor
    token: Tensor
    done: Tensor

    @classmethod
    def start(cls, seeds: Sequence[int], padding: Tensor) -> Rows:
        """All rows of a wave, before their first token."""
        request = torch.arange(len(seeds), device=padding.device)
        own_seeds = torch.tensor(seeds, device=padding.device)
        return cls(request, own_seeds, padding, torch.zeros_like(request), torch.zeros_like(request, dtype=torch.bool))

    def select(self, keep: Tensor) -> Rows:
        """The rows at indices `keep`."""
        return Rows(*(x[keep] for x in vars(self).values()))


class WaveResponses:
    """Responses of a wave's N requests. The decode loop writes tokens, log_probs [N, limit] and lengths, stopped [N].

    Until a request's stop token is drawn, its length is the limit and `stopped` is False.
    """

    def __init__(
        self, requests: Sequence[int], limit: int, version: int, device: torch.device, deliver: Deliver | None
    ) -> None:
        """requests: each row's index in the call to `generate`. deliver: called once for every response."""
        self._requests, self._version, self._deliver = requests, version, deliver
        self._responses: dict[int, Response] = {}  # by row
        count = len(requests)
        self.tokens = torch.zeros(count, limit, dtype=torch.int64, device=device)
        self.log_probs = torch.zeros(count, limit, device=device)
        self.lengths = torch.full((count,), limit, dtype=torch.int64, device=device)
        self.stopped = torch.zeros(count, dtype=torch.bool, device=device)

    def stream(self, alive: int) -> None:
        """Call `deliver` for the responses that stopped since the last call. alive: number of rows that still sample,
        which the caller has just counted; if none stopped, or there is no callback, the device is not read."""
        if self._deliver is not None and len(self._requests) - alive > len(self._responses):
            stopped = self.stopped.nonzero()[:, 0].tolist()
            self._build([row for row in stopped if row not in self._responses])

    def all(self) -> dict[int, Response]:
        """Every request's response by its index, at the end of the wave; calls `deliver` for the remaining ones."""
        self._build([row for row in range(len(self._requests)) if row not in self._responses])
        return {self._requests[row]: response for row, response in self._responses.items()}

    def _build(self, rows: list[int]) -> None:
        if not rows:
            return
        lengths = self.lengths[rows].tolist()
        longest = max(lengths)
        tokens, log_probs = (x[rows, :longest].cpu().numpy() for x in (self.tokens, self.log_probs))
        for i, (row, n, stopped) in enumerate(zip(rows, lengths, self.stopped[rows].tolist(), strict=True)):
            self._responses[row] = Response(
                tokens[i, :n].copy(), log_probs[i, :n].copy(), "stop" if stopped else "length", self._version
            )
            if self._deliver is not None:
                self._deliver(self._requests[row], self._responses[row])
