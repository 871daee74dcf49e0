"""Grading that overlaps sampling: what an engine has finished is graded while the rest is still being sampled.

One thread beside the engine's, which grades whatever has come in since its last batch. Knows no engine.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist

from nemo_disco.generation.engine import Response
from nemo_disco.rewards.registry import Grader
from nemo_disco.rollout.prompts import PromptSet
from nemo_disco.rollout.requests import response_text
from nemo_disco.runtime.collectives import on_shares
from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.signals import StoppedError


class EarlyGrades:
    """The grades of the responses to `picked`: pass `finished` to the engine, then `collect`."""

    def __init__(
        self, grader: Grader, picked: PromptSet, keep: Callable[[int, Response, str, float], None] | None = None
    ) -> None:
        """keep: is given each response with its text and grade, in this rank's thread, as it is graded."""
        self._keep = keep
        self._grader, self._picked = grader, picked
        self._waiting: queue.SimpleQueue[tuple[int, Response, str] | None] = queue.SimpleQueue()
        self._grades: dict[int, float] = {}
        self._problem: BaseException | None = None
        self._thread: threading.Thread | None = None

    def finished(self, index: int, response: Response) -> None:
        """A response to question `index` of `picked`; returns at once."""
        if self._thread is None:
            # A daemon: an engine that fails leaves it waiting, and it must not hold the process up.
            self._thread = threading.Thread(target=self._work, name="early grades", daemon=True)
            self._thread.start()
        self._waiting.put((index, response, response_text(self._picked.tokenizer, response)))

    def collect(self, texts: list[str], grade: Callable[[list[str], PromptSet], list[float]]) -> list[float]:
        """The grades of all responses: those of the thread, and by `grade`, a collective, what no engine handed over.

        Raises what the grader raised; what is wrong with a user's code, or a StoppedError, on every rank. A collective.
        """
        if self._thread is not None:
            self._waiting.put(None)
            self._thread.join()
        mine: Any = self._problem or self._grades
        if isinstance(mine, BaseException) and not isinstance(mine, UserError | StoppedError):
            raise mine
        shares = [mine] * dist.get_world_size()
        if len(shares) > 1:
            dist.all_gather_object(shares, mine)
        for share in shares:
            if isinstance(share, UserError | StoppedError):
                raise share
        known = {index: value for share in shares for index, value in share.items()}
        rest = [i for i in range(len(texts)) if i not in known]
        if rest:
            known |= dict(zip(rest, grade([texts[i] for i in rest], self._picked.select(rest)), strict=True))
        return [known[i] for i in range(len(texts))]

    def _work(self) -> None:
        ended = False
        while not ended:
            batch = [self._waiting.get()]
            while not self._waiting.empty():
                batch.append(self._waiting.get())
            ended = None in batch
            ready = [entry for entry in batch if entry is not None]
            try:
                answers = [self._picked.questions[i].answers for i, _, _ in ready]
                grades = self._grader.grade([text for _, _, text in ready], answers)
                if self._keep is not None:
                    for (i, response, text), reward in zip(ready, grades, strict=True):
                        self._keep(i, response, text, reward)
            except BaseException as problem:
                self._problem = problem
                return
            self._grades |= dict(zip([i for i, _, _ in ready], grades, strict=True))


def grade(grader: Grader, texts: Sequence[str], picked: PromptSet) -> list[float]:
    """The reward of each response, graded a share a rank. A collective."""

    def share(mine: range) -> list[float]:
        return grader.grade([texts[i] for i in mine], [picked.questions[i].answers for i in mine])

    return on_shares(len(texts), share)
