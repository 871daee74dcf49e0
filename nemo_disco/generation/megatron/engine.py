"""The engine `megatron`: samples from the policy's own weights, on the policy's own ranks. No refit, no second copy.

Data- and context-parallel ranks each take their share of the questions; TP and PP ranks decode together.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from nemo_disco.data.packing import round_up
from nemo_disco.generation.engine import Finished, Response, SamplingParams
from nemo_disco.generation.megatron.decoder import GROWTH, Cache, Decoder
from nemo_disco.generation.megatron.in_place import Rows, StaticWave
from nemo_disco.generation.megatron.token_sampling import sample, uniforms
from nemo_disco.generation.megatron.wave import WaveResponses
from nemo_disco.policy.policy import Policy

# Finished rows are carried along until they are this share: dropping rows copies the whole cache.
_COMPACT_BELOW = 0.8
# Bytes of keys and values that one wave of requests may need at its longest (CPU; a share of free memory on CUDA).
_CPU_CACHE_BYTES = 4 * 2**30
_CUDA_CACHE_SHARE = 0.6


@dataclass
class _Rows:
    """The rows still in the batch: each one's request, seed, padding before its prompt, and whether it is done."""

    request: Tensor
    seeds: Tensor
    padding: Tensor
    done: Tensor

    def select(self, rows: Tensor) -> _Rows:
        return _Rows(self.request[rows], self.seeds[rows], self.padding[rows], self.done[rows])


class MegatronEngine:
    """Engine on the live policy. `generate` is a collective: every rank passes the same requests and gets all
    responses."""

    def __init__(self, policy: Policy, stop_token_ids: Iterable[int]) -> None:
        """stop_token_ids: sampling one of them ends a response, which keeps it."""
        self.policy = policy
        self.stop = torch.tensor(sorted(set(stop_token_ids)), device=policy.device)
        self.version = 0
        self.decoder = Decoder(
            policy.model.chunks,
            policy.ranks,
            parallel_state.get_tensor_model_parallel_group(),
            parallel_state.get_pipeline_model_parallel_group(),
        )
        self._group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        ranks = policy.ranks
        self._streams = ranks.tensor == 0 and ranks.pipeline == ranks.pipeline_size - 1
        self.in_place = policy.device.type == "cuda" and ranks.tensor_size == ranks.pipeline_size == 1

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: SamplingParams,
        finished: Finished | None = None,
    ) -> list[Response]:
        """See Engine.generate. Of the ranks that decode a response together, the first tensor-parallel one of the last
        pipeline stage hands it over, from this thread."""
        self.policy.gather_weights()
        questions = [list(rows) for _, rows in groupby(range(len(prompts)), key=lambda i: tuple(prompts[i]))]
        mine = [i for rows in questions[self._group.rank() :: self._group.size()] for i in rows]
        streams = finished if self._streams else None
        found: dict[int, Response] = {}
        with torch.inference_mode():
            for wave in self._waves(mine, prompts, sampling):
                found.update(self._decode_wave(wave, prompts, seeds, sampling, streams))
        return self._gather(found, len(prompts))

    def update_weights(self, weights: Callable[[], Iterable[tuple[str, Tensor]]], version: int) -> None:  # noqa: ARG002
        """The weights are the policy's own: only the version is news. `weights` is not read."""
        self.version = version

    def sleep(self) -> None:
        """Nothing is held between calls."""

    def wake(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to end."""

    # --- one wave ---

    def _waves(
        self, mine: list[int], prompts: Sequence[Sequence[int]], sampling: SamplingParams
    ) -> Iterator[list[int]]:
        """Requests whose cache fits the memory, longest prompts together (padding is then short)."""
        mine = sorted(mine, key=lambda i: (-len(prompts[i]), _digest(prompts[i]), i))
        config = self.decoder.chunks[0].config
        a_token = 2 * config.num_layers * self.decoder.groups * self.decoder.width * self.decoder.dtype.itemsize
        room = self._cache_bytes()
        start = 0
        while start < len(mine):
            a_row = a_token * round_up(len(prompts[mine[start]]) + sampling.max_response_length, GROWTH)
            count = max(1, int(room // a_row))
            yield mine[start : start + count]
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
        finished: Finished | None,
    ) -> dict[int, Response]:
        device = self.policy.device
        logits, cache, padding = self._prefill([prompts[i] for i in wave])
        width = max(len(prompts[i]) for i in wave)
        responses = WaveResponses(wave, sampling.max_response_length, self.version, device, finished)
        if self.in_place and logits is not None:
            return self._decode_in_place(responses, logits, cache, padding, width, [seeds[i] for i in wave], sampling)
        rows = _Rows(
            request=torch.arange(len(wave), device=device),
            seeds=torch.tensor([seeds[i] for i in wave], device=device),
            padding=padding,
            done=torch.zeros(len(wave), dtype=torch.bool, device=device),
        )
        limit = sampling.max_response_length
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
            responses.hand_over(alive)
            if alive < _COMPACT_BELOW * len(rows.done):
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

    def _decode_in_place(
        self,
        responses: WaveResponses,
        logits: Tensor,
        cache: Cache,
        padding: Tensor,
        width: int,
        seeds: list[int],
        sampling: SamplingParams,
    ) -> dict[int, Response]:
        device = logits.device
        rows = Rows(
            request=torch.arange(len(seeds), device=device),
            seeds=torch.tensor(seeds, device=device),
            padding=padding,
            token=torch.zeros(len(seeds), dtype=torch.int64, device=device),
            done=torch.zeros(len(seeds), dtype=torch.bool, device=device),
        )
        StaticWave(self.decoder, cache, width, rows, sampling, self.stop, responses).run(logits)
        return responses.all()

    def _prefill(self, prompts: list[Sequence[int]]) -> tuple[Tensor | None, Cache, Tensor]:
        """Logits after each prompt, the cache and the padding [B] before each; equal prompts are computed once."""
        device = self.policy.device
        distinct: dict[tuple[int, ...], int] = {}
        which = torch.tensor([distinct.setdefault(tuple(p), len(distinct)) for p in prompts], device=device)
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
        cache.select(which)
        return (None if logits is None else logits[which]), cache, padding[which]

    def _padding_mask(self, padding: Tensor, width: int) -> Tensor | None:
        """Additive [B, 1, 1, W] that hides the padding before each prompt, of which `width` columns are to be taken;
        None where there is none. Its rows begin at multiples of GROWTH numbers, as CUDA's attention wants them."""
        if not bool(padding.any()):
            return None
        columns = round_up(width, GROWTH)
        hidden = torch.arange(columns, device=padding.device)[None] < padding[:, None]
        zeros = torch.zeros(len(padding), columns, dtype=self.decoder.dtype, device=padding.device)
        return zeros.masked_fill(hidden, float("-inf"))[:, None, None]

    def _draw(self, logits: Tensor | None, rows: _Rows, sampling: SamplingParams, t: int) -> tuple[Tensor, Tensor]:
        """The next token of each row and its log-prob, drawn by the last pipeline stage, on every stage."""
        if logits is None:
            token, log_prob = torch.zeros_like(rows.request), torch.zeros(len(rows.request), device=rows.request.device)
        else:
            token, log_prob = sample(logits, sampling, uniforms(rows.seeds, t))
            log_prob = log_prob.float()
        return self.decoder.from_last_stage(token), self.decoder.from_last_stage(log_prob)

    def _gather(self, found: dict[int, Response], total: int) -> list[Response]:
        """All ranks' responses, in the order of the requests."""
        shares = [found] * self._group.size()
        if len(shares) > 1:
            dist.all_gather_object(shares, found, group=self._group)
        responses = {i: response for share in shares for i, response in share.items()}
        return [responses[i] for i in range(total)]


def _digest(prompt: Sequence[int]) -> int:
    return zlib.crc32(np.asarray(prompt, np.int64).tobytes())
