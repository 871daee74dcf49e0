"""The dense policy of the fact-chain arm: its table of next-symbol log-probs, its warm start, and its samples.

A next symbol depends on the last symbol and the term alone, so that one forward pass over all of their 640 pairs gives
everything that sampling needs. Knows no objective.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .task import SYMBOLS, TERMS, Questions, draw_facts

WIDTH, HIDDEN = 32, 96


class FactPolicy(nn.Module):
    """log-probs of the next symbol [..., SYMBOLS], from the last symbol [...] and the term [...]."""

    def __init__(self) -> None:
        super().__init__()
        self.symbols, self.terms = nn.Embedding(SYMBOLS, WIDTH), nn.Embedding(TERMS, WIDTH)
        self.hidden, self.logits = nn.Linear(2 * WIDTH, HIDDEN), nn.Linear(HIDDEN, SYMBOLS)
        for embedding in (self.symbols, self.terms):
            nn.init.normal_(embedding.weight, std=0.5)

    def forward(self, symbols: Tensor, terms: Tensor) -> Tensor:
        inputs = torch.cat([self.symbols(symbols), self.terms(terms)], -1)
        logits: Tensor = self.logits(nn.functional.gelu(self.hidden(inputs)))
        return logits.log_softmax(-1)

    @torch.no_grad()
    def table(self) -> Tensor:
        """[SYMBOLS, TERMS, SYMBOLS] the log-probs of every next symbol, by last symbol and term."""
        table: Tensor = self(*_all_pairs())
        return table


def warm_start(seed: int, least: float, most: float, steps: int) -> FactPolicy:
    """A policy with random weights, trained for `steps` towards facts of its own (task.draw_facts)."""
    torch.manual_seed(seed)
    policy, facts = FactPolicy(), draw_facts(seed, least, most)
    optimizer = torch.optim.Adam(policy.parameters(), 3e-3, foreach=True)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
        loss = -(facts * policy(*_all_pairs())).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return policy


@dataclass(frozen=True, eq=False)
class Samples:
    """N responses, question after question: each response's `next` symbols, the `symbols` before them and the `terms`.

    All three are [N, MOST_TERMS], with padding after the last asked term. right: [N] bool.
    """

    symbols: Tensor
    terms: Tensor
    next: Tensor
    right: Tensor

    def select(self, index: Tensor) -> Samples:
        return Samples(self.symbols[index], self.terms[index], self.next[index], self.right[index])


@torch.no_grad()
def sample(table: Tensor, questions: Questions, each: int, rng: torch.Generator) -> Samples:
    """`each` responses to each question, sampled at temperature 1 from the log-probs of FactPolicy.table."""
    terms = questions.terms.repeat_interleave(each, 0)
    last = questions.first.repeat_interleave(each)
    limits = table.exp().cumsum(-1)
    limits = limits / limits[..., -1:]
    symbols, following = [], []
    for i in range(terms.shape[1]):
        symbols.append(last)
        drawn = torch.rand(len(last), 1, generator=rng)
        last = torch.searchsorted(limits[last, terms[:, i]], drawn, right=True)[:, 0].clamp(max=SYMBOLS - 1)
        following.append(last)
    nexts = torch.stack(following, 1)
    end = nexts.gather(1, questions.counts.repeat_interleave(each)[:, None] - 1)[:, 0]
    return Samples(torch.stack(symbols, 1), terms, nexts, end == questions.answers.repeat_interleave(each))


def _all_pairs() -> tuple[Tensor, Tensor]:
    """([SYMBOLS, 1] every symbol, [1, TERMS] every term), broadcast."""
    symbols, terms = torch.arange(SYMBOLS)[:, None], torch.arange(TERMS)[None]
    return symbols.expand(SYMBOLS, TERMS), terms.expand(SYMBOLS, TERMS)
