"""The order in which a run asks its questions: epoch after epoch, each shuffled anew.

Pure: the seed and the number of steps decide everything, so that a resumed run goes on exactly where it was.
"""

from __future__ import annotations

import random
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import count, islice
from typing import Any, NamedTuple

from nemo_disco.runtime.errors import UserError


class _Pool(NamedTuple):
    """The questions of one weight; per_epoch: how many of them an epoch asks."""

    weight: float
    indices: list[int]

    @property
    def per_epoch(self) -> int:
        return max(1, round(self.weight * len(self.indices)))


class QuestionOrder:
    """Gives `per_step` of `n_questions` indices for each step, none twice in a step.

    An epoch asks every question once; with `weights` [n_questions], questions of weight 2 twice and half of those of
    weight 0.5, the other half in the next epoch. It is shuffled by (seed, epoch). A question that a step has already,
    where two epochs overlap or by its weight, is deferred to the next step.
    """

    def __init__(
        self,
        n_questions: int,
        per_step: int,
        seed: int,
        shuffle: bool,
        weights: Sequence[float] | None = None,
        content: str = "",
    ) -> None:
        """content: a hash of the questions, by which a resumed run recognises them; "" for no such check.

        Raises UserError if the questions, or those that their weights leave of them, do not fill a step.
        """
        if n_questions < per_step:
            raise UserError(
                f"data.questions_per_step is {per_step}, but there are {n_questions} questions, and a step never asks "
                f"one twice; set it to at most {n_questions}, or give more questions"
            )
        self._n, self._per_step, self._seed, self._shuffle = n_questions, per_step, seed, shuffle
        self._content = content
        self._pools = _pools(weights or [1.0] * n_questions)
        self._weighted = len(self._pools) > 1 or self._pools[0].weight != 1.0
        self._size = sum(pool.per_epoch for pool in self._pools)
        self._check_weights()
        self._epoch, self._taken = 0, 0
        self._queue = deque(self._order(0))

    def next(self) -> list[int]:
        """The indices of the next step."""
        step: dict[int, None] = {}
        deferred: list[int] = []
        while len(step) < self._per_step:
            if not self._queue:
                self._epoch += 1
                self._queue, deferred = deque([*deferred, *self._order(self._epoch)]), []
            index = self._queue.popleft()
            if index in step:
                deferred.append(index)
            else:
                step[index] = None
        self._queue.extendleft(reversed(deferred))
        self._taken += self._per_step
        return list(step)

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON: the epoch, the number of its questions that were given, and the settings of the order."""
        # A step that ends with an epoch still belongs to it.
        epoch = max(0, self._taken - 1) // self._size
        return {"epoch": epoch, "position": self._taken - epoch * self._size, **self._identity()} | (
            {"content": self._content} if self._content else {}
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`. Raises UserError if it is of other questions or another seed."""
        if lines := self.changes(state):
            raise UserError(
                f"the checkpoint's data order was made with {'; '.join(lines)}; set it back, start a new run "
                "directory, or set data.if_changed=restart to go on with the new questions from their first epoch"
            )
        taken = state["epoch"] * self._size + state["position"]
        if taken % self._per_step or taken < 0:
            raise UserError(
                f"the checkpoint's data position (epoch {state['epoch']}, question {state['position']}) is not the "
                "end of a step; the checkpoint is damaged"
            )
        self._epoch, self._taken, self._queue = 0, 0, deque(self._order(0))
        for _ in range(taken // self._per_step):
            self.next()

    def changes(self, state: Mapping[str, Any]) -> list[str]:
        """The differences between this order and the one of `state`, for a message."""
        before = {"questions_per_epoch": state["questions"], **state}
        now = {**self._identity(), "questions_per_epoch": self._size}
        lines = [f"{key}={before[key]}, this run has {value}" for key, value in now.items() if before[key] != value]
        # Checkpoints of earlier versions have no content.
        if not lines and self._content and state.get("content", self._content) != self._content:
            lines = [f"{self._n} questions of other content (text, answers or fields of data.train_files changed)"]
        return lines

    def _identity(self) -> dict[str, int]:
        identity = {"questions": self._n, "questions_per_step": self._per_step}
        identity |= {"seed": self._seed, "shuffle": self._shuffle}
        return identity | ({"questions_per_epoch": self._size} if self._weighted else {})

    def _check_weights(self) -> None:
        most = max(-(-pool.per_epoch // len(pool.indices)) for pool in self._pools)
        distinct = sum(min(pool.per_epoch, len(pool.indices)) for pool in self._pools)
        if distinct < self._per_step or most * self._per_step > max(self._size, self._per_step):
            raise UserError(
                f"data.train_weights: an epoch asks {distinct} different questions, one of them up to {most} times, in "
                f"{self._size / self._per_step:.1f} steps of data.questions_per_step={self._per_step}, and a step "
                "never asks one twice; lower the largest weight, or data.questions_per_step"
            )

    def _order(self, epoch: int) -> list[int]:
        if not self._weighted:
            order = list(range(self._n))
        else:
            order = sorted(i for number, pool in enumerate(self._pools) for i in self._share(number, pool, epoch))
        if self._shuffle:
            random.Random(f"{self._seed}/{epoch}").shuffle(order)
        return order

    def _share(self, number: int, pool: _Pool, epoch: int) -> list[int]:
        """The questions of a pool that an epoch asks: the next piece of endless passes over the pool."""
        passes, start = divmod(epoch * pool.per_epoch, len(pool.indices))

        def endless() -> Iterator[int]:
            for pass_number in count(passes):
                order = list(pool.indices)
                if self._shuffle:
                    random.Random(f"{self._seed}/{number}/{pass_number}").shuffle(order)
                yield from order

        return list(islice(endless(), start, start + pool.per_epoch))


def _pools(weights: Sequence[float]) -> list[_Pool]:
    """Pools by falling weight, so that the order of the files does not change their shares."""
    by_weight: dict[float, list[int]] = defaultdict(list)
    for index, weight in enumerate(weights):
        by_weight[weight].append(index)
    return [_Pool(*pool) for pool in sorted(by_weight.items(), reverse=True)]
