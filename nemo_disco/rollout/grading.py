"""Grading of an engine's responses, which begins while the rest is still being sampled.

One thread beside the engine's grades the responses that have come in since its last batch. Knows no engine.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence

from nemo_disco.generation.engine import Response
from nemo_disco.rewards.grader import Grader
from nemo_disco.rollout.prompts import PromptSet
from nemo_disco.rollout.responses import ResponseTexts
from nemo_disco.runtime.collectives import on_every_rank, on_shares

OnGraded = Callable[[int, Response, str, float], None]


class EarlyGrading:
    """Grades responses to `prompts`: pass `finished` to the engine, then call `collect`.

    texts: of the responses; before `collect` only of those that were passed to `finished`.
    """

    def __init__(self, grader: Grader, prompts: PromptSet, on_graded: OnGraded | None = None) -> None:
        """on_graded: called with index, response, text and grade of each response that this rank's thread grades."""
        self.texts = ResponseTexts(prompts.tokenizer, len(prompts))
        self._on_graded = on_graded
        self._grader, self._prompts = grader, prompts
        self._waiting: queue.SimpleQueue[tuple[int, Response] | None] = queue.SimpleQueue()
        self._grades: dict[int, float] = {}
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def finished(self, index: int, response: Response) -> None:
        """Grade the response to prompt `index` soon; returns at once."""
        if self._thread is None:
            # A daemon: an engine that fails leaves it waiting, and it must not hold the process up.
            self._thread = threading.Thread(target=self._work, name="early grading", daemon=True)
            self._thread.start()
        self.texts.add(index, response)
        self._waiting.put((index, response))

    def collect(self, responses: Sequence[Response]) -> list[float]:
        """The grades of all responses: from all ranks' threads; the rest is graded now, an equal share on each rank.

        Raises the grader's error; a user's error or a StoppedError on every rank. A collective.
        """
        if self._thread is not None:
            self._waiting.put(None)
            self._thread.join()
        self.texts.fill(responses)
        grades = {index: grade for share in on_every_rank(self._own_grades) for index, grade in share.items()}
        rest = [i for i in range(len(responses)) if i not in grades]
        if rest:
            late = on_shares(len(rest), lambda share: self._grade([rest[i] for i in share]))
            grades |= dict(zip(rest, late, strict=True))
        return [grades[i] for i in range(len(responses))]

    def _own_grades(self) -> dict[int, float]:
        if self._error is not None:
            raise self._error
        return self._grades

    def _grade(self, rows: list[int]) -> list[float]:
        return self._grader.grade([self.texts[i] for i in rows], [self._prompts.questions[i].answers for i in rows])

    def _work(self) -> None:
        ended = False
        while not ended:
            batch = [self._waiting.get()]
            while not self._waiting.empty():
                batch.append(self._waiting.get())
            ended = None in batch
            ready = [entry for entry in batch if entry is not None]
            try:
                grades = self._grade([index for index, _ in ready])
                if self._on_graded is not None:
                    for (index, response), grade in zip(ready, grades, strict=True):
                        self._on_graded(index, response, self.texts[index], grade)
            except BaseException as error:
                self._error = error
                return
            self._grades |= dict(zip([index for index, _ in ready], grades, strict=True))
