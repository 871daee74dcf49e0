"""The engine `megatron`: samples from the policy's own weights, on the policy's own ranks. No refit, no second copy.

Data- and context-parallel ranks each decode a share of the questions; TP and PP ranks decode together.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby

import numpy as np
import torch
from megatron.core import parallel_state
from torch import Tensor

from nemo_disco.data.packing import round_up
from nemo_disco.generation.engine import Deliver, Response, SamplingParams
from nemo_disco.generation.megatron.cache import GROWTH, Cache
from nemo_disco.generation.megatron.decoder import Decoder
from nemo_disco.generation.megatron.in_place import InPlaceDecoding
from nemo_disco.generation.megatron.token_sampling import sample, uniforms
from nemo_disco.generation.megatron.wave import COMPACT_BELOW, Rows, WaveResponses
from nemo_disco.policy.policy import Policy
from nemo_disco.runtime.collectives import on_every_rank

# Limit on the keys and values of one wave with every response at its limit: bytes on a CPU, a share of free GPU memory.
_CPU_CACHE_BYTES = 4 * 2**30
_CUDA_CACHE_SHARE = 0.6


class MegatronEngine:
    """Engine on the live policy. `generate` is a collective: every rank passes the same prompts and gets all
    responses."""

    def __init__(self, policy: Policy, stop_token_ids: Iterable[int]) -> None:
        """stop_token_ids: a response ends with the first of them that is sampled."""
        self.policy = policy
        self.stop = torch.tensor(sorted(set(stop_token_ids)), device=policy.device)
        self.version = 0
        self.decoder = Decoder(policy)
        self._group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        ranks = policy.ranks
        self._delivers = ranks.tensor == 0 and ranks.pipeline == ranks.pipeline_size - 1
        # The number of tokens for each expert is read on the host, which a CUDA graph cannot do.
        alone = ranks.tensor_size == ranks.pipeline_size == 1 and not policy.shape.experts
        self.in_place = policy.device.type == "cuda" and alone

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: SamplingParams,
        deliver: Deliver | None = None,
    ) -> list[Response]:
        """See Engine.generate. Of the ranks that decode a response together, the first tensor-parallel one of the last
        pipeline stage calls `deliver`, from this thread."""
        self.policy.gather_weights()
        questions = [list(group) for _, group in groupby(range(len(prompts)), key=lambda i: tuple(prompts[i]))]
        requests = [i for group in questions[self._group.rank() :: self._group.size()] for i in group]
        responses: dict[int, Response] = {}
        with self.decoder.decoding():
            for wave in self._waves(requests, prompts, sampling):
                callback = deliver if self._delivers else None
                responses.update(self._decode_wave(wave, prompts, seeds, sampling, callback))
            self.decoder.follow()
        return self._gather(responses, len(prompts))

    def update_weights(self, weights: Callable[[], Iterable[tuple[str, Tensor]]], version: int) -> None:  # noqa: ARG002
        """Set the version of the next responses. `weights` is not read: the policy's parameters are used."""
        self.version = version

    def sleep(self) -> None:
        """Do nothing: no memory is kept between calls."""

    def wake(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing: no process was started."""

    # --- one wave ---

    def _waves(
        self, requests: list[int], prompts: Sequence[Sequence[int]], sampling: SamplingParams
    ) -> Iterator[list[int]]:
        """Split requests (indices into prompts) into waves whose cache fits the memory. Longest prompts first: a wave
        then needs little padding."""
        requests = sorted(requests, key=lambda i: (-len(prompts[i]), _digest(prompts[i]), i))
        layers, decoder = self.decoder.chunks[0].config.num_layers, self.decoder
        bytes_per_token = 2 * layers * decoder.groups * decoder.head_size * decoder.dtype.itemsize
        memory = self._cache_bytes()
        start = 0
        while start < len(requests):
            row_tokens = round_up(len(prompts[requests[start]]) + sampling.max_response_length, GROWTH)
            count = max(1, int(memory // (bytes_per_token * row_tokens)))
            yield requests[start : start + count]
            start += count

    def _cache_bytes(self) -> float:
        if self.policy.device.type == "cuda":
            return _CUDA_CACHE_SHARE * torch.cuda.mem_get_info()[0]
        return _CPU_CACHE_BYTES

    def _decode_wave(
        self,
        wave: list[int],
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: SamplingParams,
        deliver: Deliver | None,
    ) -> dict[int, Response]:
        limit, width = sampling.max_response_length, max(len(prompts[i]) for i in wave)
        logits, cache, padding = self._prefill([prompts[i] for i in wave])
        responses = WaveResponses(wave, limit, self.version, padding.device, deliver)
        rows = Rows.start([seeds[i] for i in wave], padding)
        if self.in_place and logits is not None:
            InPlaceDecoding(self.decoder, cache, width, rows, sampling, self.stop, responses).run(logits)
            return responses.all()
        mask = self._padding_mask(padding, width + limit)
        for t in range(limit):
            token, log_prob = self._draw(logits, rows, sampling, t)
            responses.tokens[rows.request, t], responses.log_probs[rows.request, t] = token, log_prob
            ending = torch.isin(token, self.stop) & ~rows.done
            ended = rows.request[ending]
            responses.lengths[ended], responses.stopped[ended] = t + 1, True
            rows.done |= ending
            alive = int((~rows.done).sum())
            if alive == 0 or t + 1 == limit:
                break
            responses.stream(alive)
            if alive < COMPACT_BELOW * len(rows.done):
                keep = (~rows.done).nonzero()[:, 0]
                rows, token = rows.select(keep), token[keep]
                cache.select(keep)
                mask = None if mask is None else mask[keep]
            end = width + t + 1
            cache.reserve(end, width + limit)
            logits = self.decoder.forward(
                token[:, None],
                (end - 1 - rows.padding)[:, None],
                cache,
                end - 1,
                None if mask is None else mask[..., :end],
            )
        return responses.all()

    def _prefill(self, prompts: list[Sequence[int]]) -> tuple[Tensor | None, Cache, Tensor]:
        """Logits [B, V] after each prompt, the cache, and the padding [B] before each; equal prompts are computed once.

        The logits are None on all but the last pipeline stage.
        """
        device = self.policy.device
        distinct: dict[tuple[int, ...], int] = {}
        row = torch.tensor([distinct.setdefault(tuple(p), len(distinct)) for p in prompts], device=device)
        width = max(map(len, distinct))
        padding = torch.tensor([width - len(p) for p in distinct], device=device)
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in distinct], device=device)
        positions = (torch.arange(width, device=device)[None] - padding[:, None]).clamp(min=0)
        mask = self._padding_mask(padding, width)
        if mask is not None:
            causal = torch.full((width, mask.shape[-1]), float("-inf"), dtype=mask.dtype, device=device).triu(1)
            mask = mask + causal
            mask.diagonal(dim1=2, dim2=3).zero_()
            mask = mask[..., :width]
        cache = self.decoder.new_cache(len(distinct))
        cache.reserve(width, width)
        logits = self.decoder.forward(ids, positions, cache, 0, mask)
        cache.select(row)
        return (None if logits is None else logits[row]), cache, padding[row]

    def _padding_mask(self, padding: Tensor, width: int) -> Tensor | None:
        """Additive mask [B, 1, 1, W >= width] that hides the padding before each prompt; None if there is no padding.

        W is a multiple of GROWTH: CUDA's attention copies a mask whose rows are not aligned.
        """
        if not bool(padding.any()):
            return None
        columns = round_up(width, GROWTH)
        hidden = torch.arange(columns, device=padding.device)[None] < padding[:, None]
        zeros = torch.zeros(len(padding), columns, dtype=self.decoder.dtype, device=padding.device)
        return zeros.masked_fill(hidden, float("-inf"))[:, None, None]

    def _draw(self, logits: Tensor | None, rows: Rows, sampling: SamplingParams, t: int) -> tuple[Tensor, Tensor]:
        """Tokens [B] and log-probs [B] at position t, drawn on the last pipeline stage and sent to every stage."""
        if logits is None:
            token, log_prob = torch.zeros_like(rows.request), torch.zeros(len(rows.request), device=rows.request.device)
        else:
            token, log_prob = sample(logits, sampling, uniforms(rows.seeds, t))
            log_prob = log_prob.float()
        return self.decoder.broadcast_last_stage(token), self.decoder.broadcast_last_stage(log_prob)

    def _gather(self, responses: dict[int, Response], total: int) -> list[Response]:
        """All ranks' responses, in the order of the prompts."""
        shares = on_every_rank(lambda: responses, self._group)
        gathered = {i: response for share in shares for i, response in share.items()}
        return [gathered[i] for i in range(total)]


def _digest(prompt: Sequence[int]) -> int:
    return zlib.crc32(np.asarray(prompt, np.int64).tobytes())
