"""The policy's network: megatron-core's GPTModel, whose output is log-probs of target tokens instead of logits.

Uses megatron-core alone; its layers are those of layers.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from torch import Tensor

from nemo_disco.models.rope import Angles
from nemo_disco.policy.likely_tokens import LikelyTokens, find_likely_tokens, token_divergences
from nemo_disco.policy.log_probs import token_log_probs
from nemo_disco.policy.rope import Rope, no_rope
from nemo_disco.policy.routes import Routes


@dataclass(frozen=True)
class Targets:
    """The values that a forward pass returns at each of n response tokens.

    rows [n]: positions in the micro-batch whose next token is a response token; tokens [n]: that next token.
    temperature: the divisor of the logits. entropies: return the entropy too. likely_tokens: return the ids and the
    log-probs of so many of the likeliest tokens too. old [n]: return the KL of the policy with these likely tokens to
    this one too (likely_tokens.token_divergences). At most one of the last two.
    """

    rows: Tensor
    tokens: Tensor
    temperature: float
    entropies: bool = False
    likely_tokens: int = 0
    old: LikelyTokens | None = None


@dataclass(frozen=True)
class TargetValues:
    """Values at n response tokens: log-probs, entropies and divergences [n] each, and the likeliest tokens [n, K]; and
    the experts that all tokens of the rollouts went through.

    All but the first are None where they were not asked for.
    """

    log_probs: Tensor
    entropies: Tensor | None = None
    divergences: Tensor | None = None
    likely: LikelyTokens | None = None
    routes: Routes | None = None

    def pack(self) -> Tensor:
        """[rows, n] of one dtype, the only form that a pipeline stage can return: a row of each present field, then K
        rows of ids and K rows of their log-probs."""
        rows = [x[None] for x in (self.log_probs, self.entropies, self.divergences) if x is not None]
        if self.likely is not None:
            # Ids are exact in float32, up to 2^24.
            rows += [self.likely.ids.T.to(self.log_probs.dtype), self.likely.log_probs.T]
        return torch.cat(rows)

    @classmethod
    def from_rows(cls, rows: Tensor, *, entropies: bool, divergences: bool) -> TargetValues:
        """The first fields of `pack`'s tensor: log-probs, and entropies and divergences if they are in it."""
        by_token = iter(rows)
        return cls(next(by_token), next(by_token) if entropies else None, next(by_token) if divergences else None)


class PolicyModel(GPTModel):  # type: ignore[misc]
    """GPTModel on packed micro-batches. Full logits never exist.

    `model(input_ids [1, S], position_ids [1, S], None, packed_seq_params=PackedSequences, labels=Targets)` returns on
    the last pipeline stage TargetValues.pack, [rows, n]; on the others the hidden states [S, 1, h].
    """

    def __init__(self, *, true_vocab_size: int, angles: Angles, **kwargs: Any) -> None:
        """true_vocab_size: rows of the output that are tokens, not padding. angles: rope's."""
        super().__init__(position_embedding_type="rope", **kwargs)
        self.true_vocab_size = true_vocab_size
        here, fused = torch.device(torch.cuda.current_device()), self.config.apply_rope_fusion
        self.rope = Rope(angles, self.config.params_dtype, here, fused=fused)
        ropeless = self.config.no_rope_freq or [0] * self.config.num_layers
        for layer in self.decoder.layers:
            layer.self_attention.rope = no_rope if ropeless[layer.layer_number - 1] else self.rope

    def embed(self, tokens: Tensor) -> Tensor:
        """[S, 1, h] the embeddings of tokens [1, S]."""
        x: Tensor = self.embedding(input_ids=tokens, position_ids=None)
        return x

    def _preprocess(
        self, input_ids: Tensor, position_ids: Tensor, decoder_input: Tensor | None = None, **_: Any
    ) -> tuple[Tensor | None, ...]:
        if decoder_input is None and self.pre_process:
            decoder_input = self.embed(input_ids)
        return decoder_input, self.rope.at(position_ids[0]), None, None, None, None

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True, **kwargs: Any) -> Any:
        """Load as megatron does, except that Transformer Engine's own state (FP8 scales, computed anew in a step) may
        be missing: a checkpoint of the local layers has none."""
        own = {name: value for name, value in self.state_dict().items() if name.endswith("._extra_state")}
        return super().load_state_dict({**own, **state}, strict=strict, **kwargs)

    def output_weight(self) -> Tensor:
        """[v_local, h] this rank's rows of the output embedding."""
        tied = self.share_embeddings_and_output_weights
        weight: Tensor = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        return weight

    def _postprocess(self, hidden_states: Tensor, labels: Targets | None = None, **kwargs: Any) -> Tensor:
        if not self.post_process:
            return hidden_states
        if labels is None:
            logits: Tensor = super()._postprocess(hidden_states, labels=None, **kwargs)
            return logits
        group = self.pg_collection.tp
        # token_log_probs gives each TP rank a share of the gradient of `hidden`; these two sum the shares in backward.
        if self.config.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(hidden_states, group=group)
        else:
            hidden_states = copy_to_tensor_model_parallel_region(hidden_states, group=group)
        hidden = hidden_states.squeeze(1).index_select(0, labels.rows)
        head = {"vocab_size": self.true_vocab_size, "tp_group": group if group.size() > 1 else None}
        return compute_values(hidden, self.output_weight(), labels, group.rank(), **head).pack()


def compute_values(hidden: Tensor, weight: Tensor, targets: Targets, tp_rank: int, **head: Any) -> TargetValues:
    """The values at the targets from their hidden states [n, h] and this rank's rows of the output weight.

    head: the vocab_size and tp_group of log_probs.token_log_probs.
    """
    head["vocab_start"] = tp_rank * len(weight)
    ids = targets.tokens[:, None]
    if targets.old is not None:
        ids = torch.cat([ids, targets.old.ids.long()], 1)
    if targets.likely_tokens:
        likely = find_likely_tokens(hidden.detach(), weight.detach(), targets.likely_tokens, **head)
        ids = torch.cat([ids, likely], 1)
    log_probs, entropies = token_log_probs(
        hidden, weight, ids, temperature=targets.temperature, entropies=targets.entropies, **head
    )
    compared = log_probs[:, 1:]
    return TargetValues(
        log_probs[:, 0],
        entropies,
        None if targets.old is None else token_divergences(compared, targets.old),
        LikelyTokens(likely, compared, likely.size(1) == head["vocab_size"]) if targets.likely_tokens else None,
    )
