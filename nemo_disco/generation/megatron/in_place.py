"""Decoding in place: every step uses the same tensors at the same addresses, so that CUDA can replay a step as a graph
instead of launching its thousand kernels again. Tested on a CPU without graphs; not yet run with them.

For one rank (no TP, no PP). The host checks which rows are done only every _CHECK_STEPS steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_disco.generation.engine import SamplingParams
from nemo_disco.generation.megatron.cache import Cache
from nemo_disco.generation.megatron.decoder import Decoder
from nemo_disco.generation.megatron.token_sampling import sample, uniforms
from nemo_disco.generation.megatron.wave import COMPACT_BELOW, Rows, WaveResponses

# Steps between two checks of which rows are done: a check waits for the device; until then ended rows go on decoding.
_CHECK_STEPS = 32
# False launches each step's kernels one by one in place of a CUDA graph. benchmarks/gpu measures both.
GRAPHS = True


class InPlaceDecoding:
    """Decodes one wave of requests; the sampled tokens go into its WaveResponses."""

    def __init__(
        self,
        decoder: Decoder,
        cache: Cache,
        width: int,
        rows: Rows,
        sampling: SamplingParams,
        stop: Tensor,
        responses: WaveResponses,
    ) -> None:
        """width: tokens that the cache holds for each row, padding included. stop: the tokens that end a response."""
        self.responses = responses
        self.decoder, self.cache, self.rows, self.sampling, self.stop = decoder, cache, rows, sampling, stop
        device = rows.request.device
        self.max_tokens = width + sampling.max_response_length
        self.t = torch.zeros(1, dtype=torch.int64, device=device)
        self.position = torch.full((1,), width, dtype=torch.int64, device=device)  # of the next token, in the cache
        self._width = width
        self._graph: torch.cuda.CUDAGraph | None = None

    def run(self, logits: Tensor) -> None:
        """Decode until all rows are done or at the response limit. logits [B, V]: after the prompts."""
        limit = self.sampling.max_response_length
        self._sample(logits)
        count = 1  # tokens of a response so far
        while count < limit and self._drop_done_rows():
            end = self._width + count
            self._reserve(end)
            steps = min(limit - count, self.cache.capacity - end + 1, _CHECK_STEPS)
            for _ in range(steps):
                self._replay()
            count += steps

    def _drop_done_rows(self) -> bool:
        """Stream the responses of done rows, and drop the rows if they are many. False if none remains."""
        alive = int((~self.rows.done).sum())
        self.responses.stream(alive)
        if 0 < alive < COMPACT_BELOW * len(self.rows.done):
            keep = (~self.rows.done).nonzero()[:, 0]
            self.rows = self.rows.select(keep)
            self._graph = None  # it reads the old rows
            self.cache.select(keep)
        return alive > 0

    def _reserve(self, tokens: int) -> None:
        if tokens > self.cache.capacity:
            self._graph = None
            self.cache.reserve(tokens, self.max_tokens)

    # --- one step, in place ---

    def _step(self) -> None:
        """Decode and sample the next token of every row."""
        columns = torch.arange(self.cache.capacity, device=self.position.device)
        hidden = (columns < self.rows.padding[:, None]) | (columns > self.position)
        mask = torch.zeros(hidden.shape, dtype=self.decoder.dtype, device=hidden.device)
        mask.masked_fill_(hidden, float("-inf"))
        positions = (self.position - self.rows.padding)[:, None]
        token = self.rows.token[:, None]
        logits = self.decoder.forward(token, positions, self.cache, self.position, mask[:, None, None])
        assert logits is not None, "a pipeline stage does not decode in place"
        self.position += 1
        self._sample(logits)

    def _sample(self, logits: Tensor) -> None:
        """Sample a token for each row, and update the responses and the rows."""
        rows, responses = self.rows, self.responses
        token, log_prob = sample(logits, self.sampling, uniforms(rows.seeds, self.t))
        responses.tokens[rows.request, self.t] = token
        responses.log_probs[rows.request, self.t] = log_prob.float()
        ending = (token[:, None] == self.stop).any(1) & ~rows.done
        responses.lengths[rows.request] = torch.where(ending, self.t + 1, responses.lengths[rows.request])
        responses.stopped[rows.request] = responses.stopped[rows.request] | ending
        rows.done |= ending
        rows.token.copy_(token)
        self.t += 1

    def _replay(self) -> None:
        if self.position.device.type == "cpu" or not GRAPHS:
            self._step()
            return
        if self._graph is None:
            self._graph = self._capture()
        self._graph.replay()

    def _capture(self) -> torch.cuda.CUDAGraph:
        """Capture a step as a graph. Restores the tensors that the warm-up and the capture change, except the cache's
        next column, which the first replay writes again."""
        responses = self.responses
        state = (responses.tokens, responses.log_probs, responses.lengths, responses.stopped)
        tensors = [self.t, self.position, *state, self.rows.token, self.rows.done]
        before = [x.clone() for x in tensors]
        warm_up = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        warm_up.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm_up):
            self._step()
        torch.cuda.current_stream().wait_stream(warm_up)
        graph = torch.cuda.CUDAGraph()
        # Another thread may use CUDA meanwhile (the one that writes a checkpoint in the background).
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._step()
        for x, value in zip(tensors, before, strict=True):
            x.copy_(value)
        return graph
