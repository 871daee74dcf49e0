"""The fact-chain task: sums in a chain of facts, each of which a start knows more or less well.

A question is a symbol and three to six terms. The response has one symbol for each term, each the sum so far; it is
right if the last one is. Pure and seeded; touches no model and no file.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

SYMBOLS = 64  # the vocabulary; no sum wraps, since 9 + 6 x 9 = 63
TERMS = 10  # terms are digits
FEWEST_TERMS, MOST_TERMS = 3, 6
SMALLEST, LARGEST = 2, 9
OFFSETS = (-1, 1, -2, 2, 10, -10)  # of a start's wrong sums from the right one


@dataclass(frozen=True, eq=False)
class Questions:
    """Q questions: `first` [Q] the symbol that each begins with, `terms` [Q, MOST_TERMS], `counts` [Q] how many of the
    terms are asked (the others are padding)."""

    first: Tensor
    terms: Tensor
    counts: Tensor

    def __len__(self) -> int:
        return len(self.first)

    @property
    def asked(self) -> Tensor:
        """[Q, MOST_TERMS] bool: the terms that are asked."""
        return torch.arange(MOST_TERMS) < self.counts[:, None]

    @property
    def answers(self) -> Tensor:
        """[Q] the right last symbols."""
        return self.first + (self.terms * self.asked).sum(1)

    def select(self, index: Tensor) -> Questions:
        return Questions(self.first[index], self.terms[index], self.counts[index])


def draw_sets(sizes: tuple[int, ...]) -> list[Questions]:
    """Sets of questions of the given sizes, the same ones at every call; no question is in them twice."""
    questions = _skip_repeated(_draw(random.Random(0)))
    return [_stack(list(islice(questions, size))) for size in sizes]


def _draw(rng: random.Random) -> Iterator[tuple[int, ...]]:
    """Endless questions: the first symbol, then the terms."""
    while True:
        count = rng.randint(FEWEST_TERMS, MOST_TERMS)
        yield tuple(rng.randint(SMALLEST, LARGEST) for _ in range(1 + count))


def _skip_repeated(questions: Iterator[tuple[int, ...]]) -> Iterator[tuple[int, ...]]:
    seen: set[tuple[int, ...]] = set()
    for question in questions:
        if question not in seen:
            seen.add(question)
            yield question


def _stack(questions: list[tuple[int, ...]]) -> Questions:
    terms = [[*q[1:], *[0] * (1 + MOST_TERMS - len(q))] for q in questions]
    return Questions(
        torch.tensor([q[0] for q in questions]), torch.tensor(terms), torch.tensor([len(q) - 1 for q in questions])
    )


def draw_facts(seed: int, least: float, most: float) -> Tensor:
    """[SYMBOLS, TERMS, SYMBOLS] the probabilities of the next symbol that a start is to have, by symbol and term.

    The right sum's is uniform between `least` and `most`; the rest is on the sums at OFFSETS, unevenly.
    """
    rng = torch.Generator().manual_seed(seed)
    right = torch.rand(SYMBOLS, TERMS, generator=rng) * (most - least) + least
    wrong = torch.rand(SYMBOLS, TERMS, len(OFFSETS), generator=rng) ** 2 + 0.01
    wrong = wrong / wrong.sum(-1, keepdim=True) * (1 - right)[..., None]
    sums = torch.arange(SYMBOLS)[:, None] + torch.arange(TERMS)
    facts = torch.zeros(SYMBOLS, TERMS, SYMBOLS)
    for place, offset in enumerate((0, *OFFSETS)):
        share = right if place == 0 else wrong[..., place - 1]
        facts.scatter_add_(-1, ((sums + offset) % SYMBOLS)[..., None], share[..., None])
    return facts
