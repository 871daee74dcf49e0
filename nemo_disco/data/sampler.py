"""Which questions a step asks: epoch after epoch, each in its own order.

Pure: the seed and the number of steps taken decide everything, so that a resumed run goes on exactly where it was.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

from nemo_disco.runtime.errors import UserError


class QuestionSampler:
    """Hands out `per_step` of `n_questions` indices a step; every question once an epoch, none twice in a step.

    A step that reaches the end of an epoch goes on with the next one, past the questions that it already holds; they
    come right after it. Every epoch is a permutation by (seed, epoch), mended at that seam.
    """

    def __init__(self, n_questions: int, per_step: int, seed: int, shuffle: bool) -> None:
        if n_questions < per_step:
            raise UserError(
                f"data.questions_per_step is {per_step}, but there are {n_questions} questions, and a step never asks "
                f"one twice; set it to at most {n_questions}, or give more questions"
            )
        self._n, self._per_step, self._seed, self._shuffle = n_questions, per_step, seed, shuffle
        self._epoch, self._position = 0, 0
        self._order = self._permutation()

    def next(self) -> list[int]:
        """The indices of this step."""
        step = self._order[self._position : self._position + self._per_step]
        self._position += len(step)
        missing = self._per_step - len(step)
        if missing:
            self._epoch += 1
            fresh, asked = self._permutation(), set(step)
            first = [i for i in fresh if i not in asked][:missing]
            asked = set(first)
            self._order = first + [i for i in fresh if i not in asked]
            self._position = missing
            step += first
        return step

    def state_dict(self) -> dict[str, int]:
        """Plain JSON: the epoch, the questions of it that were handed out, and what the order depends on."""
        return {"epoch": self._epoch, "position": self._position, **self._identity()}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on where `state` was taken. Raises UserError where it is of other questions or another seed."""
        for key, value in self._identity().items():
            if state[key] != value:
                raise UserError(
                    f"the checkpoint's data order was made with {key}={state[key]}, this run has {value}; "
                    "set it back, or start a new run directory"
                )
        replay = QuestionSampler(self._n, self._per_step, self._seed, self._shuffle)
        for _ in range((state["epoch"] * self._n + state["position"]) // self._per_step):
            replay.next()
        if replay.state_dict() != dict(state):
            raise UserError(
                f"the checkpoint's data position (epoch {state['epoch']}, question {state['position']}) is not the "
                "end of a step; the checkpoint is damaged"
            )
        self._epoch, self._position, self._order = replay._epoch, replay._position, replay._order

    def _identity(self) -> dict[str, int]:
        return {
            "questions": self._n,
            "questions_per_step": self._per_step,
            "seed": self._seed,
            "shuffle": self._shuffle,
        }

    def _permutation(self) -> list[int]:
        order = list(range(self._n))
        if self._shuffle:
            random.Random(f"{self._seed}/{self._epoch}").shuffle(order)
        return order
