"""Decoding in place: every tensor of a step lies where it lay in the step before, so that CUDA replays a step as one
graph instead of launching its thousand kernels anew. Eager on a CPU, where it is tested; as graphs: not run.

For one rank (no TP, no PP). The host looks at the rows only every _LOOK steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_disco.generation.engine import SamplingParams
from nemo_disco.generation.megatron.decoder import Cache, Decoder
from nemo_disco.generation.megatron.token_sampling import sample, uniforms
from nemo_disco.generation.megatron.wave import WaveResponses

# Steps between two looks at which rows are done: each is a wait, and rows that ended meanwhile run on.
_LOOK = 32
# Finished rows are carried along until they are this share: dropping rows copies the cache and captures a new graph.
_COMPACT_BELOW = 0.8
# Whether CUDA replays steps as graphs; without them it launches the same code anew. benchmarks/gpu measures both.
GRAPHS = True


@dataclass
class Rows:
    """The rows still in the batch: each one's request, seed, padding before its prompt, last token, and whether it is
    done."""

    request: Tensor
    seeds: Tensor
    padding: Tensor
    token: Tensor
    done: Tensor

    def select(self, keep: Tensor) -> Rows:
        return Rows(*(x[keep] for x in vars(self).values()))


class StaticWave:
    """One wave of requests: their rows and cache; what is sampled goes into its WaveResponses."""

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
        """width: of the longest prompt, up to where the cache is filled. stop: the tokens that end a response."""
        self.responses = responses
        self.decoder, self.cache, self.rows, self.sampling, self.stop = decoder, cache, rows, sampling, stop
        device = rows.request.device
        self.most = width + sampling.max_response_length
        self.t = torch.zeros(1, dtype=torch.int64, device=device)
        self.place = torch.full((1,), width, dtype=torch.int64, device=device)
        self._width = width
        self._graph: torch.cuda.CUDAGraph | None = None

    def run(self, logits: Tensor) -> None:
        """Decode to the end, from the logits [B, V] after the prompts."""
        limit = self.sampling.max_response_length
        self._take(logits)
        done = 1
        while done < limit and self._rows_left():
            end = self._width + done
            self._reserve(end)
            steps = min(limit - done, self.cache.capacity - end + 1, _LOOK)
            for _ in range(steps):
                self._replay()
            done += steps

    def _rows_left(self) -> bool:
        """Whether any row is not done. The responses of those that are go out, and they leave the batch once they are
        many."""
        alive = int((~self.rows.done).sum())
        self.responses.hand_over(alive)
        if 0 < alive < _COMPACT_BELOW * len(self.rows.done):
            keep = (~self.rows.done).nonzero()[:, 0]
            self.rows = self.rows.select(keep)
            self._graph = None  # it reads the old rows
            self.cache.select(keep)
        return alive > 0

    def _reserve(self, tokens: int) -> None:
        if tokens > self.cache.capacity:
            self._graph = None
            self.cache.reserve(tokens, self.most)

    # --- one step, in place ---

    def _step(self) -> None:
        """The token after the last one of every row."""
        columns = torch.arange(self.cache.capacity, device=self.place.device)
        hidden = (columns < self.rows.padding[:, None]) | (columns > self.place)
        mask = torch.zeros(hidden.shape, dtype=self.decoder.dtype, device=hidden.device)
        mask.masked_fill_(hidden, float("-inf"))
        positions = (self.place - self.rows.padding)[:, None]
        logits = self.decoder.forward(self.rows.token[:, None], positions, self.cache, self.place, mask[:, None, None])
        assert logits is not None, "a pipeline stage does not decode in place"
        self.place += 1
        self._take(logits)

    def _take(self, logits: Tensor) -> None:
        """Draw the next token of each row, and note what it means for it."""
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
        if self.place.device.type == "cpu" or not GRAPHS:
            self._step()
            return
        if self._graph is None:
            self._graph = self._captured()
        self._graph.replay()

    def _captured(self) -> torch.cuda.CUDAGraph:
        """A step as a graph. What warming up and capturing change is put back; the cache's next column is written
        anew anyway."""
        responses = self.responses
        state = (responses.tokens, responses.log_probs, responses.lengths, responses.stopped)
        changed = [self.t, self.place, *state, self.rows.token, self.rows.done]
        before = [x.clone() for x in changed]
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Another thread may use CUDA meanwhile (a checkpoint that is written behind the run).
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._step()
        for x, value in zip(changed, before, strict=True):
            x.copy_(value)
        return graph
