"""Router replay: the experts that one pass chose for each token, used again by later passes over the same tokens.

Rounding can turn the choice between two experts with nearly equal scores, and then log-probs differ although no weight
has changed. Every pass of the step's mini-batches takes the choices of the old log-probs' pass, which are its own and
recorded, or those of the engine (arXiv 2510.11370); the weights of the chosen experts come from the present router.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_disco.data.rollouts import Rollouts
from nemo_disco.models.shape import ModelShape
from nemo_disco.runtime.errors import UserError


@dataclass(frozen=True)
class Routes:
    """The K experts of each of S tokens, prompts included, in the layers of this pipeline stage.

    chosen: layer -> [S, K] on the host, uint8 for up to 256 experts. A token that went through no model (the last of a
    response, and all of an empty one) has experts 0, and is in no later pass either.
    """

    chosen: dict[int, Tensor]

    def select(self, rollouts: Rollouts, responses: Sequence[int] | Tensor) -> Routes:
        """Those of the tokens of some of the rollouts' responses, in the order given."""
        index = rollouts.sequence_index(responses)
        return Routes({layer: chosen[index] for layer, chosen in self.chosen.items()})

    @classmethod
    def of_engine(cls, rollouts: Rollouts, shape: ModelShape, chunks: Iterable[Any]) -> Routes:
        """Those of the engine's pass over the rollouts, in the layers of the model's chunks on this rank (PolicyModel).
        Raises UserError if the rollouts have none, or another model's."""
        routes, fault = rollouts.routes, ""
        if routes is None:
            fault = "the rollouts have no experts of an engine's pass; sample them anew with this setting"
        elif routes.shape[1:] != (shape.layers, shape.experts_per_token) or int(routes.max()) >= shape.experts:
            fault = (
                f"the rollouts have {routes.size(2)} of at least {int(routes.max()) + 1} experts in {routes.size(1)} "
                f"layers, the model {shape.experts_per_token} of {shape.experts} in {shape.layers}"
            )
        if routes is None or fault:
            raise UserError(f"model.moe_router_replay=engine: {fault}")
        layers = [layer.layer_number for chunk in chunks for layer in chunk.decoder.layers]
        return cls({layer: routes[:, layer - 1] for layer in layers})

    @classmethod
    def gather(cls, batches: Iterable[Any], tokens: int, group: dist.ProcessGroup) -> Routes:
        """The routes that the micro-batches of a stage's ranks recorded; each token went through one of the ranks.

        batches: this rank's (MicroBatch). tokens: S. On the device is one layer at a time. A collective of the group.
        """
        recorded: list[TokenRoutes] = [batch.sequences.routes for batch in batches]
        chosen = {}
        for layer, example in recorded[0].recorded.items():
            whole = example.new_zeros(tokens, example.size(1))
            for batch in recorded:
                here = batch.places >= 0
                whole[batch.places[here]] = batch.recorded[layer][here]
            dist.all_reduce(whole, group=group)
            chosen[layer] = whole.cpu()
        return cls(chosen)


@dataclass
class TokenRoutes:
    """The experts of this rank's s tokens of one micro-batch: given to its routers, or recorded by them.

    places [s]: each token's index among the S tokens of the rollouts; -1 for padding. given: layer -> [s, K]; None: to
    be recorded.
    """

    places: Tensor
    given: dict[int, Tensor] | None = None
    recorded: dict[int, Tensor] = field(default_factory=dict)  # layer -> [s, K]
    changed: dict[int, Tensor] = field(default_factory=dict)  # layer -> tokens whose router chooses other experts

    @classmethod
    def of(cls, places: Tensor, routes: Routes | None) -> TokenRoutes:
        """routes: to be given; None: to be recorded."""
        if routes is None:
            return cls(places)
        index = places.clamp(min=0)
        return cls(places, {layer: chosen[index] for layer, chosen in routes.chosen.items()})

    def choose(self, layer: int, own: Tensor, experts: int) -> Tensor:
        """The experts [s, K] of a layer's tokens. own [s, K]: those that its router chooses, among `experts`."""
        if self.given is None:  # neither gloo nor NCCL sums int16
            self.recorded[layer] = own.detach().to(torch.uint8 if experts <= 256 else torch.int32)
            return own
        here = self.places >= 0
        given = torch.where(here[:, None], self.given[layer].to(own.dtype), own)
        self.changed[layer] = (own.sort(-1).values != given.sort(-1).values).any(-1).sum()
        return given

    def changes(self) -> Tensor:
        """[2] the sum of `changed` over the layers, and the number of pairs of a token and a layer."""
        pairs = (self.places >= 0).sum() * len(self.changed)
        return torch.stack([sum(self.changed.values(), torch.zeros_like(pairs)), pairs])


def changed_share(batches: Iterable[Any]) -> float:
    """The share of all pairs of a token and a layer in which the routers would choose other experts than those given to
    this rank's micro-batches, and to the other ranks'. A collective of all ranks."""
    counts = sum(batch.sequences.routes.changes() for batch in batches)
    assert isinstance(counts, Tensor)
    dist.all_reduce(counts)
    changed, pairs = counts.tolist()
    return float(changed / max(pairs, 1))
