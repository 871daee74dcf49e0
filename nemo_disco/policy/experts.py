"""A layer's router and experts, in place of an MLP: megatron-core's modules, the same for training and for decoding.

Every token goes through its chosen experts: there is no capacity, so that no token is dropped, and no auxiliary loss.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from nemo_disco.policy.modules import Output
from nemo_disco.policy.routes import TokenRoutes


class PolicyRouter(TopKRouter):  # type: ignore[misc]
    """megatron's router, whose probabilities are transformers': in float32, or in float64 for a float64 model."""

    def __init__(self, *, normalised: bool, **kwargs: Any) -> None:
        """normalised: the weights of a token's experts are divided by their sum."""
        super().__init__(**kwargs)
        self.normalised = normalised

    def forward(self, hidden_states: Tensor, routes: TokenRoutes | None = None) -> tuple[Tensor, Tensor]:
        """The weights of the chosen experts, 0 elsewhere, and which are chosen, [tokens, experts] both. routes: those
        of the micro-batch's tokens; None: the router decides alone."""
        logits = F.linear(hidden_states.flatten(0, -2), self.weight)
        scores = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        chosen = scores.topk(self.topk, dim=-1).indices
        if routes is not None:
            chosen = routes.choose(self.layer_number, chosen, self.num_experts)
        weights = scores.gather(1, chosen)
        if self.normalised:
            weights = weights / weights.sum(-1, keepdim=True)
        places = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, chosen, True)
        return torch.zeros_like(scores).scatter(1, chosen, weights), places


class PolicyExperts(MoELayer):  # type: ignore[misc]
    """megatron's layer of a router, experts, and a dispatcher that brings each token to the ranks of its experts."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for parameter in self.experts.parameters():
            # Gradients are summed over the ranks that have the same experts. megatron sums over data parallelism where
            # experts are not split among ranks, which misses tensor-parallel ranks that have them too.
            parameter.allreduce = False

    def forward(self, hidden_states: Tensor, sequences: Any = None, **_: Any) -> Output:
        """The output [S, 1, h], and no bias. sequences: a micro-batch's, or a decoding step."""
        dispatcher = self.token_dispatcher
        weights, routes = self.router(hidden_states, getattr(sequences, "routes", None))
        x, weights = dispatcher.dispatch_preprocess(hidden_states, routes, weights)
        x, weights = dispatcher.token_dispatch(x, weights)
        x, tokens_per_expert, weights = dispatcher.dispatch_postprocess(x, weights)
        x, _ = self.experts(x, tokens_per_expert, weights)
        x = dispatcher.token_combine(dispatcher.combine_preprocess(x))
        return dispatcher.combine_postprocess(x), None
