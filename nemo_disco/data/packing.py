"""The packing plan of a mini-batch: pure, deterministic, in integers, so that every rank computes the same. Invariants:
(1) every rank has the same number of micro-batches, a multiple of count_multiple; (2) every response is in exactly one;
(3) none is over the token budget, padding included; (4) one is empty only if there are fewer responses than slots;
(5) the lengths in each slot do not depend on the responses' order. Aims: 0.97 of `possible_fill` wherever whole
sequences allow it, and an attention-aware cost that is level over the ranks (max/mean <= 1.05).
"""

from __future__ import annotations

import heapq
import random
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from operator import neg

import numpy as np
import numpy.typing as npt

from nemo_disco.runtime.errors import UserError

Bin = list[int]  # positions in the sequence of padded sizes, which falls
Ints = npt.NDArray[np.int64]

_LEVEL = 1.005  # ranks this close to the mean are left alone
_CANDIDATES = 128  # sizes that a subset is chosen from: 8,000 pairs, 300,000 triples
# Where room is tight, so many bins are taken apart and filled anew, so many times: 20 ms.
_REPAIRED, _REPAIRS = 8, 250
_SPLITS = 24  # ways that are tried of sharing the sequences of two bins


@dataclass(frozen=True)
class Plan:
    """Who runs what. micro_batches[rank][k]: response indices, rising; the most expensive micro-batch of a rank first.

    An empty micro-batch is run on a dummy sequence of weight 0, so that every rank takes part in every collective.
    padded_tokens: tokens over all micro-batches, padding included. fill: the responses' own tokens over the tokens that
    all slots could hold. imbalance: cost of the most loaded rank over the mean.
    """

    micro_batches: tuple[tuple[tuple[int, ...], ...], ...]
    padded_tokens: int
    fill: float
    imbalance: float

    @property
    def count(self) -> int:
        """Micro-batches a rank."""
        return len(self.micro_batches[0])


def round_up(length: int, multiple: int) -> int:
    """`length` rounded up to a multiple."""
    return -(-length // multiple) * multiple


def causal_attention_span(parameters: int, layers: int, attention_width: int) -> float:
    """The length, in tokens, at which causal attention costs as much as the matrix products.

    A sequence of n tokens takes 2 n parameters FLOPs forward in the matrix products (the output layer counts, the
    embedding's look-up does not) and 4 width n (n / 2) a layer in causal attention: its cost goes as n + n^2 / span
    with span = parameters / (layers * width), 12 hidden sizes for GPT. attention_width: heads times head dimension.
    """
    return parameters / (layers * attention_width)


def possible_fill(tokens: int, token_budget: int, data_parallel_size: int) -> float:
    """The fill that arithmetic allows, were responses divisible: total / (DP ceil(total / (DP budget)) budget)."""
    step = data_parallel_size * token_budget
    return tokens / round_up(tokens, step)


def plan_micro_batches(
    lengths: Sequence[int],
    *,
    token_budget: int,
    data_parallel_size: int = 1,
    sequence_multiple: int = 1,
    micro_batch_multiple: int = 1,
    count_multiple: int = 1,
    attention_span: float | None = None,
) -> Plan:
    """Place responses in micro-batches of at most `token_budget` tokens, the same number on every rank.

    lengths [N]: prompt and response, in tokens. sequence_multiple: every sequence is padded to it (2 CP);
    micro_batch_multiple: so is every micro-batch (TP under SP, 16 to 128 under FP8). count_multiple: PP under virtual
    pipeline stages. attention_span: see `causal_attention_span`; None is cost by tokens alone.
    Raises UserError naming both numbers if a sequence does not fit.
    """
    if min(token_budget, data_parallel_size, sequence_multiple, micro_batch_multiple, count_multiple) < 1:
        raise ValueError("plan_micro_batches: the budget, the DP size and the multiples are at least 1")
    lengths = [int(n) for n in lengths]  # a NumPy integer would overflow in the subset sums
    if min(lengths, default=1) < 1:
        raise ValueError("plan_micro_batches: a sequence has at least one token, its prompt's")
    capacity = token_budget // micro_batch_multiple * micro_batch_multiple
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    sizes = [round_up(lengths[i], sequence_multiple) for i in order]
    if sizes and sizes[0] > capacity:
        raise UserError(_over_budget(lengths[order[0]], sizes[0], token_budget, micro_batch_multiple))
    # Integers: sums must not depend on a processor's vector width, or ranks would disagree about the plan.
    span = None if attention_span is None else max(1, round(attention_span))
    costs = [n if span is None else n * (span + n) for n in sizes]
    bins = _pack(sizes, costs, capacity, data_parallel_size, count_multiple)
    ranks = _deal(bins, costs, data_parallel_size)
    _level(ranks, sizes, costs, capacity)
    loads = [_load(rank, costs) for rank in ranks]
    for rank in ranks:
        rank.sort(key=lambda b: (-_load([b], costs), b))
    return Plan(
        micro_batches=tuple(tuple(tuple(sorted(order[i] for i in b)) for b in rank) for rank in ranks),
        padded_tokens=sum(round_up(sum(sizes[i] for i in b), micro_batch_multiple) for b in bins),
        fill=sum(lengths) / (len(bins) * token_budget),
        imbalance=max(loads) * len(loads) / sum(loads) if sizes else 1.0,
    )


def _over_budget(length: int, size: int, token_budget: int, multiple: int) -> str:
    need = round_up(size, multiple)
    grown = f" ({need} with the layout's padding)" if need != length else ""
    return (
        f"a sequence of {length} tokens{grown}, prompt and response, does not fit in a micro-batch: "
        f"model.token_budget is {token_budget}; raise it to at least {need}, or lower "
        f"generation.max_response_length"
    )


def _pack(sizes: list[int], costs: list[int], capacity: int, ranks: int, count_multiple: int) -> list[Bin]:
    """As many bins as `ranks` times a multiple of `count_multiple`, the fewest that were found to hold everything."""
    step = ranks * count_multiple
    slots = max(step, round_up(-(-sum(sizes) // capacity), step))
    bins = _spread(sizes, costs, capacity, slots)
    if bins is None:
        bins = _repair(_fill(sizes, capacity, slots), sizes, capacity, slots)
        slots = round_up(len(bins), step)
        bins = _spread(sizes, costs, capacity, slots) or bins + [[] for _ in range(slots - len(bins))]
    for empty in (b for b in bins if not b):
        fullest = max(bins, key=len)
        if len(fullest) > 1:
            empty.append(fullest.pop())
    return bins


def _spread(sizes: list[int], costs: list[int], capacity: int, slots: int) -> list[Bin] | None:
    """Each sequence, longest first, to the cheapest bin with room for it: level bins, but None where room is tight."""
    bins: list[Bin] = [[] for _ in range(slots)]
    room = [capacity] * slots
    cheapest = [(0, b) for b in range(slots)]
    for i, size in enumerate(sizes):
        full = []
        while cheapest and room[cheapest[0][1]] < size:
            full.append(heapq.heappop(cheapest))
        if not cheapest:
            return None
        cost, b = cheapest[0]
        heapq.heapreplace(cheapest, (cost + costs[i], b))
        bins[b].append(i)
        room[b] -= size
        for entry in full:
            heapq.heappush(cheapest, entry)
    return bins


def _fill(sizes: list[int], capacity: int, slots: int) -> list[Bin]:
    """Bin by bin: the longest sequence left, and the set of others that fills the bin.

    A bin is full within its share of the space that `slots` bins leave over; so short sequences, which fill gaps best,
    last to the end. Opens more than `slots` bins where it must.
    """
    left = list(range(len(sizes)))
    spare = slots * capacity - sum(sizes)
    bins: list[Bin] = []
    while left:
        first = left.pop(0)
        room = capacity - sizes[first]
        slack = max(0, spare) // max(1, slots - len(bins))
        picked, total = _best_subset([sizes[i] for i in left], room, slack)
        bins.append([first, *(left[k] for k in picked)])
        for k in reversed(picked):
            del left[k]
        spare -= room - total
    return bins


def _repair(bins: list[Bin], sizes: list[int], capacity: int, slots: int) -> list[Bin]:
    """Fewer bins, `slots` at best: the emptiest and some others are filled anew, and kept if fuller ones come of it."""
    rng = random.Random(0)
    loads = [sum(sizes[i] for i in b) for b in bins]
    for _ in range(_REPAIRS):
        if len(bins) <= slots:
            break
        emptiest = loads.index(min(loads))
        chosen = {emptiest, *rng.sample(range(len(bins)), min(_REPAIRED, len(bins)))}
        pool = sorted(i for b in chosen for i in bins[b])
        filled = [[pool[k] for k in b] for b in _fill([sizes[i] for i in pool], capacity, len(chosen) - 1)]
        filled_loads = [sum(sizes[i] for i in b) for b in filled]
        # Of equally many bins the more uneven are the better: what is free then lies together.
        if (len(filled), -_squares(filled_loads)) <= (len(chosen), -_squares(loads[b] for b in chosen)):
            for b in sorted(chosen, reverse=True):
                del bins[b], loads[b]
            bins += filled
            loads += filled_loads
    return bins


def _squares(numbers: Iterable[int]) -> int:
    return sum(n * n for n in numbers)


def _best_subset(sizes: list[int], room: int, slack: int) -> tuple[list[int], int]:
    """Rising positions of a set whose sum is within `slack` of `room`, or as near below it as was found; and its sum.

    sizes: falling. At most _CANDIDATES of them, evenly chosen, longest first, are looked at.
    """
    fitting = range(bisect_left(sizes, -room, key=neg), len(sizes))
    return _subset_sum(sizes, fitting[:: max(1, -(-len(fitting) // _CANDIDATES))], room, slack)


def _subset_sum(sizes: list[int], candidates: Sequence[int], room: int, slack: int) -> tuple[list[int], int]:
    """See _best_subset; bit s of reach[k] says that s is the sum of some of the first k candidates."""
    reach, keep = [1], (1 << (room + 1)) - 1
    for k in candidates:
        reach.append((reach[-1] | reach[-1] << sizes[k]) & keep)
        if reach[-1].bit_length() > room - slack:
            break
    total = rest = reach[-1].bit_length() - 1
    picked = []
    for before, k in reversed(list(zip(reach[:-1], candidates, strict=False))):
        if not before >> rest & 1:
            picked.append(k)
            rest -= sizes[k]
    return picked[::-1], total


def _deal(bins: list[Bin], costs: list[int], ranks: int) -> list[list[Bin]]:
    """The same number of bins to every rank: each, dearest first, to the rank that has least so far."""
    dealt: list[list[Bin]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for b in sorted(bins, key=lambda b: (-_load([b], costs), b)):
        rank = min((r for r in range(ranks) if len(dealt[r]) < len(bins) // ranks), key=lambda r: loads[r])
        dealt[rank].append(b)
        loads[rank] += _load([b], costs)
    return dealt


def _load(rank: list[Bin], costs: list[int]) -> int:
    return sum(costs[i] for b in rank for i in b)


def _level(ranks: list[list[Bin]], sizes: list[int], costs: list[int], capacity: int) -> None:
    """Exchange bins or sequences between the most loaded rank and a less loaded one, in place, while it helps."""
    for _ in range(4 * len(ranks)):
        loads = [_load(rank, costs) for rank in ranks]
        by_load = sorted(range(len(ranks)), key=lambda r: loads[r])
        top = by_load[-1]
        if loads[top] * len(ranks) <= _LEVEL * sum(loads):
            return
        others = by_load[:-1]
        if not any(
            change(ranks[top], ranks[r], loads[top] - loads[r], sizes, costs, capacity)
            for change in (_exchange, _share)
            for r in others
        ):
            return


def _exchange(heavy: list[Bin], light: list[Bin], gap: int, sizes: list[int], costs: list[int], capacity: int) -> bool:
    """Make the one exchange that comes nearest to halving the gap; False if none narrows it."""
    whole, h, k = _nearest(_differences([_load([b], costs) for b in heavy], [_load([b], costs) for b in light]), gap)
    given = _Items.of(heavy, sizes, costs, capacity, blanks=False)
    taken = _Items.of(light, sizes, costs, capacity, blanks=True)  # a blank stands for nothing in return
    blank = taken.size == 0
    lone = np.array([len(heavy[b]) == 1 for b in given.bin], dtype=bool)
    # What narrows the gap is dearer, so longer, than what comes in return: only the light bin grows.
    allowed = (_differences(given.size, taken.size) <= taken.room) & ~(lone[:, None] & blank)
    single, i, j = _nearest(np.where(allowed, _differences(given.cost, taken.cost), 0), gap)
    if min(whole, single) >= gap:
        return False
    if whole <= single:
        heavy[h], light[k] = light[k], heavy[h]
        return True
    source, target = heavy[given.bin[i]], light[taken.bin[j]]
    source.remove(given.item[i])
    target.append(given.item[i])
    if not blank[j]:
        target.remove(taken.item[j])
        source.append(taken.item[j])
    return True


def _share(heavy: list[Bin], light: list[Bin], gap: int, sizes: list[int], costs: list[int], capacity: int) -> bool:
    """Where full bins leave no room for an exchange: share the sequences of a heavy and a light bin anew, in the way
    of those tried that comes nearest to halving the gap; False if none narrows it."""
    rng = random.Random(0)
    best: tuple[int, int, int, Bin] = (gap, 0, 0, [])
    for (h, full), (k, other) in product(enumerate(heavy), enumerate(light)):
        pool = sorted(full + other)
        pool_sizes = [sizes[i] for i in pool]
        slack = max(0, 2 * capacity - sum(pool_sizes))
        for _ in range(_SPLITS):
            picked, total = _subset_sum(pool_sizes, rng.sample(range(len(pool)), len(pool)), capacity, slack)
            if 0 < len(picked) < len(pool) and sum(pool_sizes) - total <= capacity:
                kept = [pool[i] for i in picked]
                left = abs(gap - 2 * (_load([full], costs) - _load([kept], costs)))
                best = min(best, (left, h, k, kept))
    if best[0] >= gap:
        return False
    _, h, k, kept = best
    given = set(heavy[h] + light[k]) - set(kept)
    heavy[h][:], light[k][:] = sorted(kept), sorted(given)  # in place: the plan counts these very bins
    return True


def _differences(a: Sequence[int] | Ints, b: Sequence[int] | Ints) -> Ints:
    return np.subtract.outer(np.asarray(a, dtype=np.int64), np.asarray(b, dtype=np.int64))


def _nearest(moved: Ints, gap: int) -> tuple[int, int, int]:
    """What is left of the gap by the best entry of `moved`, and where that entry stands."""
    rest = np.abs(gap - 2 * moved)
    row, column = divmod(int(rest.argmin()), moved.shape[1])
    return int(rest[row, column]), row, column


@dataclass(frozen=True)
class _Items:
    """The sequences of one rank as columns: position, bin, size, cost, and the room left in their bin."""

    item: list[int]
    bin: list[int]
    size: Ints
    cost: Ints
    room: Ints

    @classmethod
    def of(cls, rank: list[Bin], sizes: list[int], costs: list[int], capacity: int, *, blanks: bool) -> _Items:
        rows = [(i, k, sizes[i], costs[i]) for k, b in enumerate(rank) for i in b]
        rows += [(-1, k, 0, 0) for k in range(len(rank))] if blanks else []
        room = [capacity - sum(sizes[i] for i in b) for b in rank]
        return cls(
            item=[r[0] for r in rows],
            bin=[r[1] for r in rows],
            size=np.array([r[2] for r in rows], dtype=np.int64),
            cost=np.array([r[3] for r in rows], dtype=np.int64),
            room=np.array([room[r[1]] for r in rows], dtype=np.int64),
        )
