"""Packing of a mini-batch's responses into micro-batches: pure and in integers, so that every rank computes the same.
Invariants: (1) all ranks have equally many micro-batches, a multiple of count_multiple; (2) each response is in exactly
one; (3) none exceeds the token budget, padding included; (4) one is empty only if there are fewer responses than
micro-batches; (5) the lengths in each do not depend on the responses' order. Aims: where whole sequences allow it, 0.97
of the fill that sequences which could be cut would give; equal attention-aware cost on all ranks (max/mean <= 1.05).
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

Plan = tuple[tuple[tuple[int, ...], ...], ...]  # plan[rank][k]: indices of the responses in the rank's k-th micro-batch
Bin = list[int]  # a micro-batch in the making: positions in the list of padded sizes, which is descending
Ints = npt.NDArray[np.int64]

_BALANCED = 1.005  # load of the most loaded rank over the mean that needs no further balancing
_CANDIDATES = 128  # sizes among which a subset is chosen: 8,000 pairs, 300,000 triples
_REPAIRED, _REPAIRS = 8, 250  # bins that are emptied and refilled in one repair, and number of repairs: 20 ms
_SPLITS = 24  # random splits that are tried of the sequences of two bins


def round_up(length: int, multiple: int) -> int:
    """`length` rounded up to a multiple."""
    return -(-length // multiple) * multiple


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
    """Pack responses into micro-batches of at most `token_budget` tokens, equally many on every rank. Returns the
    responses of each, ascending; a rank's costliest micro-batch comes first. An empty micro-batch is run on a dummy
    sequence of weight 0, so that every rank takes part in every collective.

    lengths [N]: prompt and response, in tokens. sequence_multiple: every sequence is padded to a multiple of it (2 CP);
    micro_batch_multiple: every micro-batch is (TP under SP, 16 to 128 under FP8). count_multiple: micro-batches of a
    rank are a multiple of it (PP under virtual pipeline stages). attention_span: length in tokens at which causal
    attention costs as much as the matrix products, parameters / (layers * heads * head dimension); None counts tokens
    alone as cost. Raises UserError naming length and budget if a sequence does not fit.
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
    ranks = _assign(bins, costs, data_parallel_size)
    _balance(ranks, sizes, costs, capacity)
    for rank in ranks:
        rank.sort(key=lambda b: (-_load([b], costs), b))
    return tuple(tuple(tuple(sorted(order[i] for i in b)) for b in rank) for rank in ranks)


def _over_budget(length: int, size: int, token_budget: int, multiple: int) -> str:
    need = round_up(size, multiple)
    padding = f" ({need} with the layout's padding)" if need != length else ""
    return (
        f"a sequence of {length} tokens{padding}, prompt and response, does not fit in a micro-batch: "
        f"model.token_budget is {token_budget}; raise it to at least {need}, or lower "
        f"generation.max_response_length"
    )


def _pack(sizes: list[int], costs: list[int], capacity: int, ranks: int, count_multiple: int) -> list[Bin]:
    """Bins that hold all sequences; their number is the smallest multiple of ranks * count_multiple that was found."""
    step = ranks * count_multiple
    count = max(step, round_up(-(-sum(sizes) // capacity), step))
    bins = _spread(sizes, costs, capacity, count)
    if bins is None:
        bins = _repair(_fill(sizes, capacity, count), sizes, capacity, count)
        count = round_up(len(bins), step)
        bins = _spread(sizes, costs, capacity, count) or bins + [[] for _ in range(count - len(bins))]
    for empty in (b for b in bins if not b):
        fullest = max(bins, key=len)
        if len(fullest) > 1:
            empty.append(fullest.pop())
    return bins


def _spread(sizes: list[int], costs: list[int], capacity: int, count: int) -> list[Bin] | None:
    """`count` bins of similar cost: each sequence, longest first, goes to the cheapest with room; None if none has."""
    bins: list[Bin] = [[] for _ in range(count)]
    room = [capacity] * count
    cheapest = [(0, b) for b in range(count)]
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


def _fill(sizes: list[int], capacity: int, count: int) -> list[Bin]:
    """Bins filled one after another: the longest remaining sequence, and the subset of the others that fills the bin.

    Each bin may leave free its share of the space that `count` bins leave over, so that short sequences, which fill
    gaps best, remain for later bins. Opens more than `count` bins if needed.
    """
    remaining = list(range(len(sizes)))
    spare = count * capacity - sum(sizes)
    bins: list[Bin] = []
    while remaining:
        first = remaining.pop(0)
        room = capacity - sizes[first]
        slack = max(0, spare) // max(1, count - len(bins))
        rest = [sizes[i] for i in remaining]
        fitting = range(bisect_left(rest, -room, key=neg), len(rest))
        candidates = fitting[:: max(1, -(-len(fitting) // _CANDIDATES))]  # evenly spaced, longest first
        subset, total = _subset_sum(rest, candidates, room, slack)
        bins.append([first, *(remaining[k] for k in subset)])
        for k in reversed(subset):
            del remaining[k]
        spare -= room - total
    return bins


def _repair(bins: list[Bin], sizes: list[int], capacity: int, count: int) -> list[Bin]:
    """Reduce the number of bins towards `count`: refill the emptiest and some others, and keep the result if better."""
    rng = random.Random(0)
    loads = [sum(sizes[i] for i in b) for b in bins]
    for _ in range(_REPAIRS):
        if len(bins) <= count:
            break
        emptiest = loads.index(min(loads))
        chosen = {emptiest, *rng.sample(range(len(bins)), min(_REPAIRED, len(bins)))}
        pool = sorted(i for b in chosen for i in bins[b])
        refilled = [[pool[k] for k in b] for b in _fill([sizes[i] for i in pool], capacity, len(chosen) - 1)]
        refilled_loads = [sum(sizes[i] for i in b) for b in refilled]
        # Of equally many bins the more uneven ones are better: their free space lies together.
        if (len(refilled), -_squares(refilled_loads)) <= (len(chosen), -_squares(loads[b] for b in chosen)):
            for b in sorted(chosen, reverse=True):
                del bins[b], loads[b]
            bins += refilled
            loads += refilled_loads
    return bins


def _squares(numbers: Iterable[int]) -> int:
    return sum(n * n for n in numbers)


def _subset_sum(sizes: list[int], candidates: Sequence[int], room: int, slack: int) -> tuple[list[int], int]:
    """Some of the candidates, positions in `sizes`, and their sum: within `slack` below `room`, or the closest below.

    Bit s of reach[k] is set if s is the sum of a subset of the first k candidates.
    """
    reach, keep = [1], (1 << (room + 1)) - 1
    for k in candidates:
        reach.append((reach[-1] | reach[-1] << sizes[k]) & keep)
        if reach[-1].bit_length() > room - slack:
            break
    total = rest = reach[-1].bit_length() - 1
    subset = []
    for before, k in reversed(list(zip(reach[:-1], candidates, strict=False))):
        if not before >> rest & 1:
            subset.append(k)
            rest -= sizes[k]
    return subset[::-1], total


def _assign(bins: list[Bin], costs: list[int], rank_count: int) -> list[list[Bin]]:
    """Equally many bins for each rank: each bin, costliest first, goes to the least loaded rank that needs one."""
    ranks: list[list[Bin]] = [[] for _ in range(rank_count)]
    loads = [0] * rank_count
    for b in sorted(bins, key=lambda b: (-_load([b], costs), b)):
        rank = min((r for r in range(rank_count) if len(ranks[r]) < len(bins) // rank_count), key=lambda r: loads[r])
        ranks[rank].append(b)
        loads[rank] += _load([b], costs)
    return ranks


def _load(rank: list[Bin], costs: list[int]) -> int:
    return sum(costs[i] for b in rank for i in b)


def _balance(ranks: list[list[Bin]], sizes: list[int], costs: list[int], capacity: int) -> None:
    """Move bins or sequences between the most loaded rank and a less loaded one, in place, as long as it helps."""
    for _ in range(4 * len(ranks)):
        loads = [_load(rank, costs) for rank in ranks]
        by_load = sorted(range(len(ranks)), key=lambda r: loads[r])
        top = by_load[-1]
        if loads[top] * len(ranks) <= _BALANCED * sum(loads):
            return
        others = by_load[:-1]
        if not any(
            change(ranks[top], ranks[r], loads[top] - loads[r], sizes, costs, capacity)
            for change in (_exchange, _resplit)
            for r in others
        ):
            return


def _exchange(heavy: list[Bin], light: list[Bin], gap: int, sizes: list[int], costs: list[int], capacity: int) -> bool:
    """Exchange a bin or sequence of `heavy` for one of `light`, or for none, so that the gap between their loads is
    smallest; False if no exchange narrows it."""
    whole, h, k = _best_move(_differences([_load([b], costs) for b in heavy], [_load([b], costs) for b in light]), gap)
    out = _Items.from_bins(heavy, sizes, costs, capacity, blanks=False)
    back = _Items.from_bins(light, sizes, costs, capacity, blanks=True)  # a blank: nothing comes back
    blank = back.size == 0
    alone = np.array([len(heavy[b]) == 1 for b in out.bin], dtype=bool)
    # An exchange that narrows the gap sends the costlier, so longer, sequence: only the light bin grows.
    allowed = (_differences(out.size, back.size) <= back.room) & ~(alone[:, None] & blank)
    single, i, j = _best_move(np.where(allowed, _differences(out.cost, back.cost), 0), gap)
    if min(whole, single) >= gap:
        return False
    if whole <= single:
        heavy[h], light[k] = light[k], heavy[h]
        return True
    source, target = heavy[out.bin[i]], light[back.bin[j]]
    source.remove(out.item[i])
    target.append(out.item[i])
    if not blank[j]:
        target.remove(back.item[j])
        source.append(back.item[j])
    return True


def _resplit(heavy: list[Bin], light: list[Bin], gap: int, sizes: list[int], costs: list[int], capacity: int) -> bool:
    """Split the sequences of a heavy and a light bin anew, for bins too full for an exchange: of the random splits the
    one after which the gap between the ranks' loads is smallest; False if none narrows it."""
    rng = random.Random(0)
    best: tuple[int, int, int, Bin] = (gap, 0, 0, [])
    for (h, heavy_bin), (k, light_bin) in product(enumerate(heavy), enumerate(light)):
        pool = sorted(heavy_bin + light_bin)
        pool_sizes = [sizes[i] for i in pool]
        slack = max(0, 2 * capacity - sum(pool_sizes))
        for _ in range(_SPLITS):
            subset, total = _subset_sum(pool_sizes, rng.sample(range(len(pool)), len(pool)), capacity, slack)
            if 0 < len(subset) < len(pool) and sum(pool_sizes) - total <= capacity:
                stay = [pool[i] for i in subset]
                new_gap = abs(gap - 2 * (_load([heavy_bin], costs) - _load([stay], costs)))
                best = min(best, (new_gap, h, k, stay))
    if best[0] >= gap:
        return False
    _, h, k, stay = best
    moved = set(heavy[h] + light[k]) - set(stay)
    heavy[h], light[k] = sorted(stay), sorted(moved)
    return True


def _differences(a: Sequence[int] | Ints, b: Sequence[int] | Ints) -> Ints:
    return np.subtract.outer(np.asarray(a, dtype=np.int64), np.asarray(b, dtype=np.int64))


def _best_move(moved_cost: Ints, gap: int) -> tuple[int, int, int]:
    """The smallest gap after moving an entry of `moved_cost` from one side to the other; the entry's row and column."""
    gaps = np.abs(gap - 2 * moved_cost)
    row, column = divmod(int(gaps.argmin()), moved_cost.shape[1])
    return int(gaps[row, column]), row, column


@dataclass(frozen=True)
class _Items:
    """The sequences of one rank as columns: position, bin, size, cost, and free room in the bin. A blank, one for each
    bin, has size 0 and position -1."""

    item: list[int]
    bin: list[int]
    size: Ints
    cost: Ints
    room: Ints

    @classmethod
    def from_bins(cls, bins: list[Bin], sizes: list[int], costs: list[int], capacity: int, blanks: bool) -> _Items:
        rows = [(i, k, sizes[i], costs[i]) for k, b in enumerate(bins) for i in b]
        rows += [(-1, k, 0, 0) for k in range(len(bins))] if blanks else []
        room = [capacity - sum(sizes[i] for i in b) for b in bins]
        return cls(
            item=[r[0] for r in rows],
            bin=[r[1] for r in rows],
            size=np.array([r[2] for r in rows], dtype=np.int64),
            cost=np.array([r[3] for r in rows], dtype=np.int64),
            room=np.array([room[r[1]] for r in rows], dtype=np.int64),
        )
