"""The tokens of one wave of requests of the megatron engine, and the responses that they become.

A response is built, and handed to whoever streams, once its row has ended. Knows no model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nemo_disco.generation.engine import Finished, Response


class WaveResponses:
    """tokens, log_probs [N, limit]; lengths, stopped [N], of the N requests: the decode loop writes them in place.

    lengths is the limit, and stopped False, until a request's stop token is drawn.
    """

    def __init__(
        self, requests: Sequence[int], limit: int, version: int, device: torch.device, finished: Finished | None
    ) -> None:
        """requests: each row's place in the call to `generate`. finished: is given every response once."""
        self._requests, self._version, self._finished = requests, version, finished
        self._ended: dict[int, Response] = {}  # by row
        count = len(requests)
        self.tokens = torch.zeros(count, limit, dtype=torch.int64, device=device)
        self.log_probs = torch.zeros(count, limit, device=device)
        self.lengths = torch.full((count,), limit, dtype=torch.int64, device=device)
        self.stopped = torch.zeros(count, dtype=torch.bool, device=device)

    def hand_over(self, alive: int) -> None:
        """Give away the responses that stopped since the last call. alive: rows that have not, which the caller has
        just counted: where it is as before, or nobody streams, nothing is read from the device."""
        if self._finished is not None and len(self._requests) - alive > len(self._ended):
            stopped = self.stopped.nonzero()[:, 0].tolist()
            self._take([row for row in stopped if row not in self._ended])

    def all(self) -> dict[int, Response]:
        """Every request's response, at the end of the wave; those at the limit are given away now."""
        self._take([row for row in range(len(self._requests)) if row not in self._ended])
        return {self._requests[row]: response for row, response in self._ended.items()}

    def _take(self, rows: list[int]) -> None:
        if not rows:
            return
        lengths = self.lengths[rows].tolist()
        longest = max(lengths)
        tokens, log_probs = (x[rows, :longest].cpu().numpy() for x in (self.tokens, self.log_probs))
        for at, (row, n, stopped) in enumerate(zip(rows, lengths, self.stopped[rows].tolist(), strict=True)):
            self._ended[row] = Response(
                tokens[at, :n].copy(), log_probs[at, :n].copy(), "stop" if stopped else "length", self._version
            )
            if self._finished is not None:
                self._finished(self._requests[row], self._ended[row])
