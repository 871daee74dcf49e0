"""Forward pass of the policy's own modules with a cache of keys and values, at any TP x PP, for the megatron engine.

The network is the policy's: what it computes between tokens and logits is written nowhere else. Knows nothing of
sampling.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nemo_disco.generation.megatron.cache import Cache, DecodingStep
from nemo_disco.policy.model import PolicyModel
from nemo_disco.policy.modules import PolicyAttention, PolicyLayer, sequence_parallel_off
from nemo_disco.policy.policy import Policy
from nemo_disco.runtime.errors import UserError

# Without cuDNN, which SDPA prefers on Hopper: it builds a plan (tens of milliseconds) for each new number of keys, and
# plain decoding adds one key at every token. benchmarks/gpu measures both.
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Decoder:
    """Forward pass of the layers of this rank, in the order in which the whole model runs them."""

    def __init__(self, policy: Policy) -> None:
        """Raises UserError for a network with attention that the cache does not compute."""
        _check(policy.model.chunks)
        self.chunks, self.ranks = policy.model.chunks, policy.ranks
        self.tensor_group = parallel_state.get_tensor_model_parallel_group()
        self.pipeline_group = parallel_state.get_pipeline_model_parallel_group()
        # The ranks that exchange tokens for experts, if more than those that decode the same rows in any case.
        exchange = parallel_state.get_expert_tensor_and_model_parallel_group()
        self._exchange_group = exchange if policy.shape.experts and exchange.size() > self.ranks.tensor_size else None
        config = self.chunks[0].config
        self.head_size = config.kv_channels
        self.groups = config.num_query_groups // self.ranks.tensor_size
        self.hidden, self.device = config.hidden_size, policy.device
        self.dtype: torch.dtype = config.params_dtype

    def new_cache(self, rows: int) -> Cache:
        layers = [layer.layer_number for chunk in self.chunks for layer in chunk.decoder.layers]
        return Cache(layers, (rows, self.groups, self.head_size), next(self.chunks[0].parameters()))

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """Context of all calls of `forward`: no gradients, and every rank has all tokens."""
        with torch.inference_mode(), sequence_parallel_off(self.chunks), sdpa_kernel(BACKENDS):
            yield

    def forward(
        self, tokens: Tensor, positions: Tensor, cache: Cache, start: int | Tensor, mask: Tensor | None
    ) -> Tensor | None:
        """Logits [B, V] after the last of tokens [B, t], on the last pipeline stage; None on the others.

        positions [B, t]: for rope. start, mask: see DecodingStep. Ranks that exchange tokens for experts take part in
        each other's passes: when this rank has no more of its own, call `follow`.
        """
        self._vote(True)
        return self._forward(tokens, positions, cache, start, mask)

    def follow(self) -> None:
        """Take part in the passes of other ranks, with a token of no use, until all are in `follow`."""
        token = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        while self._vote(False):
            cache = self.new_cache(1)
            cache.reserve(1, 1)
            self._forward(token, token, cache, 0, None)

    def _vote(self, decodes: bool) -> bool:
        """True if a rank of the exchange still decodes. A collective of them."""
        if self._exchange_group is None:
            return False
        votes = torch.tensor(int(decodes), device=self.device)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self._exchange_group)
        return not decodes and bool(votes)  # read, which waits for the device, only where the answer is not known

    def _forward(
        self, tokens: Tensor, positions: Tensor, cache: Cache, start: int | Tensor, mask: Tensor | None
    ) -> Tensor | None:
        rows = len(tokens)
        step = DecodingStep(cache=cache, rows=rows, start=start, mask=mask)
        rotation = self.chunks[0].rope.at(positions.flatten())
        for chunk in self.chunks:
            # The rows' tokens are one sequence for everything but attention.
            x = chunk.embed(tokens.view(1, -1)) if chunk.pre_process else self._receive(tokens)
            for layer in chunk.decoder.layers:
                x, _ = layer.forward(x, rotary_pos_emb=rotation, packed_seq_params=step)
            if chunk.post_process:
                return self._logits(chunk, x.view(rows, -1, self.hidden)[:, -1])
            self._send(x)
        return None

    def _logits(self, chunk: PolicyModel, x: Tensor) -> Tensor:
        logits = F.linear(chunk.decoder.final_layernorm(x), chunk.output_weight())
        if self.ranks.tensor_size > 1:
            shards = [torch.empty_like(logits) for _ in range(self.ranks.tensor_size)]
            dist.all_gather(shards, logits.contiguous(), group=self.tensor_group)
            logits = torch.cat(shards, dim=-1)
        logits = logits[:, : chunk.true_vocab_size]
        return logits if logits.dtype is torch.float64 else logits.float()

    # --- between pipeline stages ---

    def _neighbour(self, step: int) -> int:
        stage = (self.ranks.pipeline + step) % self.ranks.pipeline_size
        return dist.get_global_rank(self.pipeline_group, stage)

    def _send(self, x: Tensor) -> None:
        dist.send(x.contiguous(), dst=self._neighbour(+1), group=self.pipeline_group)

    def _receive(self, tokens: Tensor) -> Tensor:
        x = torch.empty(tokens.numel(), 1, self.hidden, dtype=self.dtype, device=tokens.device)
        dist.recv(x, src=self._neighbour(-1), group=self.pipeline_group)
        return x

    def broadcast_last_stage(self, x: Tensor) -> Tensor:
        """Overwrite x on every pipeline stage with the last stage's x, and return it. A collective of the stages."""
        if self.ranks.pipeline_size > 1:
            source = dist.get_global_rank(self.pipeline_group, self.ranks.pipeline_size - 1)
            dist.broadcast(x, src=source, group=self.pipeline_group)
        return x


def _check(chunks: Sequence[PolicyModel]) -> None:
    """Raises UserError unless every layer's attention is one that DecodingStep computes."""
    kinds = {getattr(chunk.config, "softmax_type", "vanilla") for chunk in chunks} - {"vanilla"}
    layers = [layer for chunk in chunks for layer in chunk.decoder.layers]
    other = [
        type(module).__name__
        for layer in layers
        for module, kind in ((layer, PolicyLayer), (getattr(layer, "self_attention", None), PolicyAttention))
        if not isinstance(module, kind)
    ]
    if found := [*(f"softmax_type={kind}" for kind in sorted(kinds)), *other]:
        raise UserError(f"generation.engine=megatron does not compute {found[0]} of this network; use generation=vllm")
