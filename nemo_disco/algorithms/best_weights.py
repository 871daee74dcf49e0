"""RUN/best: the weights of a run with the highest mean Pass@1 on its evaluation sets.

RUN/best says of which step it is, by what score on what sets, and agrees with the loop's state in every life. Rank 0
alone touches the files.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nemo_disco.evaluation.result import EvaluationResult
from nemo_disco.policy.policy import Policy
from nemo_disco.runtime.collectives import first
from nemo_disco.runtime.files import atomic_directory, first_free, put_in_place, remove, writing
from nemo_disco.runtime.model_record import ModelRecord, as_files, read_record
from nemo_disco.runtime.rundir import RunDirectory


class BestWeights:
    """`chosen`: the highest mean Pass@1 so far (score), after which step, and on which sets, sampled and judged how
    (of, a hash): scores of other sets are not compared with it.

    What RUN/best held up to the last checkpoint is kept as RUN/best.before until there is a later one: a life that
    begins at that checkpoint has the best weights of its own past. Every method is a collective.
    """

    def __init__(self, run: RunDirectory, log: Callable[[str], None]) -> None:
        """log: takes lines for the person."""
        self.run, self.log = run, log
        self.chosen: ModelRecord | None = None

    @property
    def before(self) -> Path:
        """The second name of the RUN/best that the last checkpoint knows, from which a resumed life takes it back."""
        return self.run.path / "best.before"

    def consider(self, step: int, results: Sequence[EvaluationResult]) -> bool:
        """Whether the weights of now have the highest mean Pass@1 so far, by their results; it is remembered."""
        if not results:
            return False
        score, of = float(np.mean([result.correct.mean() for result in results])), _of(results)
        if self.chosen is not None and self.chosen["of"] != of:
            self._begin_anew(step)
        if self.chosen is not None and score <= self.chosen["score"]:
            return False
        self.chosen = {"step": step, "score": score, "of": of}
        return True

    def keep(self, policy: Policy, saved: int) -> None:
        """Write the weights of now, which were chosen, as RUN/best. saved: the step of the last checkpoint, which is
        whole; 0 if there is none."""
        assert self.chosen is not None
        first(lambda: self._keep_before(saved))
        policy.export(self.run.best, as_files(self.chosen))
        score, step = self.chosen["score"], self.chosen["step"]
        self.log(f"step {step}: the best so far (mean Pass@1 {score:.3f}), kept in {self.run.best}")

    def release(self, saved: int) -> None:
        """Let go of what a life that begins at the last checkpoint, of step `saved`, does not need."""
        if self.chosen is None or self.chosen["step"] <= saved:
            first(lambda: remove(self.before))

    def load_state(self, chosen: Any, step: int) -> None:
        """Go on from a checkpoint of `step`, whose state has `chosen` (of an earlier version, a number: compared with
        nothing). RUN/best of a later step goes, and what it replaced comes back; this is said."""
        known: ModelRecord | None = chosen if isinstance(chosen, dict) else None  # type: ignore[assignment]
        self.chosen, said = first(lambda: self._settle(known, step))
        if said:
            self.log(said)

    def _settle(self, known: ModelRecord | None, step: int) -> tuple[ModelRecord | None, str]:
        """Make RUN/best one of a step up to `step`, or none; what is chosen then, and what to say."""
        best = self.run.best
        with writing(best):
            there, before = read_record(best), read_record(self.before)
            if there is not None and there["step"] <= step:
                remove(self.before)
                return there, ""
            gone = f"{best} was of step {there['step']}, beyond step {step}" if there else f"{best} is not there"
            if before is not None and before["step"] <= step:
                put_in_place(self.before, best)
                return before, f"{gone}: the best of step {before['step']}, which it had replaced, is there again"
            remove(self.before)
            if there is not None:
                remove(best)
            elif os.path.lexists(best):
                unknown = self.run.path / "best.unknown"
                others = (unknown.with_name(f"{unknown.name}.{n}") for n in itertools.count(2))
                place = first_free(itertools.chain([unknown], others))
                best.rename(place)
                gone = f"{best} did not say of which step it was, and is now {place}"
            if known is not None and known["step"] > 0:
                return None, f"{gone}: the best is chosen anew"
            return known, f"{gone}, and was removed" if there is not None else ""

    def _keep_before(self, saved: int) -> None:
        """Keep RUN/best under its second name too, if it is the one that the last checkpoint knows; without hard links,
        under that alone."""
        there = read_record(self.run.best)
        if there is None or there["step"] > saved:
            return
        remove(self.before)
        try:
            with atomic_directory(self.before) as work:
                shutil.copytree(self.run.best, work, copy_function=os.link, dirs_exist_ok=True)
        except Exception:
            with writing(self.before):
                self.run.best.rename(self.before)

    def _begin_anew(self, step: int) -> None:
        """Another choice begins; what the last one chose is kept beside it."""
        assert self.chosen is not None
        best = self.run.best
        kept = self.run.path / f"best.step_{self.chosen['step']}"

        def keep() -> bool:
            if not best.is_dir() or kept.exists():
                return False
            best.rename(kept)
            return True

        where = f"; {best} of step {self.chosen['step']} is now {kept}" if first(keep) else ""
        self.log(f"step {step}: the evaluations are others than before: the best is chosen anew{where}")
        self.chosen = None


def _of(results: Sequence[EvaluationResult]) -> str:
    """A hash of the evaluation sets and of how they are sampled and judged; the weights do not count."""
    said = [
        {k: v for k, v in (r.identity or {}).items() if k not in ("step", "weights", "training_step")} for r in results
    ]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
