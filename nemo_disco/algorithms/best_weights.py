"""RUN/best: the weights of a run with the highest mean Pass@1 on its evaluation sets.

RUN/best records its step, its score and a hash of the sets, and agrees with the checkpoint from which a run resumes.
Rank 0 alone touches the files.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nemo_disco.evaluation.result import EvaluationResult
from nemo_disco.policy.policy import Policy
from nemo_disco.runtime.collectives import on_first_rank
from nemo_disco.runtime.files import atomic_directory, first_free, put_in_place, remove, writing
from nemo_disco.runtime.rundir import ModelRecord, RunDirectory, as_files, read_model_record


@dataclass(eq=False)
class BestWeights:
    """Chooses and keeps the best weights. log: prints a line for the user.

    record: the highest mean Pass@1 so far (score), its step, and a hash of the sets and of how they are sampled and
    graded (of): scores on other sets are not compared with it. The RUN/best of the last checkpoint is kept as
    RUN/best.before until there is a later checkpoint: a run that resumes there gets it back. Every method is a
    collective.
    """

    run: RunDirectory
    log: Callable[[str], None]
    record: ModelRecord | None = None

    @property
    def before(self) -> Path:
        """The directory of the last checkpoint's RUN/best, for a run that resumes there."""
        return self.run.path / "best.before"

    def consider(self, step: int, results: Sequence[EvaluationResult]) -> bool:
        """True if, by these results, the present weights have the highest mean Pass@1 so far; then sets `record`."""
        if not results:
            return False
        score, sets = float(np.mean([result.correct.mean() for result in results])), _hash_of_sets(results)
        if self.record is not None and self.record["of"] != sets:
            self._begin_anew(step)
        if self.record is not None and score <= self.record["score"]:
            return False
        self.record = {"step": step, "score": score, "of": sets}
        return True

    def keep(self, policy: Policy, saved: int) -> None:
        """Write the present weights, which `consider` found best, as RUN/best. saved: the step of the last complete
        checkpoint; 0 if there is none."""
        assert self.record is not None
        on_first_rank(lambda: self._keep_before(saved))
        policy.export(self.run.best, as_files(self.record))
        score, step = self.record["score"], self.record["step"]
        self.log(f"step {step}: the best so far (mean Pass@1 {score:.3f}), kept in {self.run.best}")

    def release(self, saved: int) -> None:
        """Remove RUN/best.before if a run that resumes at the last checkpoint, of step `saved`, does not need it."""
        if self.record is None or self.record["step"] <= saved:
            on_first_rank(lambda: remove(self.before))

    def load_state(self, state: Any, step: int) -> None:
        """Resume from a checkpoint of `step`. state: its `record` (a number in an earlier version: ignored). A RUN/best
        of a later step is removed, and the one before it put back; both are logged."""
        record: ModelRecord | None = state if isinstance(state, dict) else None  # type: ignore[assignment]
        self.record, note = on_first_rank(lambda: self._restore(record, step))
        if note:
            self.log(note)

    def _restore(self, record: ModelRecord | None, step: int) -> tuple[ModelRecord | None, str]:
        """Make RUN/best one of a step up to `step`, or none. Returns the new `record` and a note for the log."""
        best = self.run.best
        with writing(best):
            present, before = read_model_record(best), read_model_record(self.before)
            if present is not None and present["step"] <= step:
                remove(self.before)
                return present, ""
            reason = f"{best} was of step {present['step']}, beyond step {step}" if present else f"{best} is not there"
            if before is not None and before["step"] <= step:
                put_in_place(self.before, best)
                return before, f"{reason}: the best of step {before['step']}, which it had replaced, is there again"
            remove(self.before)
            if present is not None:
                remove(best)
            elif os.path.lexists(best):
                unknown = self.run.path / "best.unknown"
                others = (unknown.with_name(f"{unknown.name}.{n}") for n in itertools.count(2))
                place = first_free(itertools.chain([unknown], others))
                best.rename(place)
                reason = f"{best} did not say of which step it was, and is now {place}"
            if record is not None and record["step"] > 0:
                return None, f"{reason}: the best is chosen anew"
            return record, f"{reason}, and was removed" if present is not None else ""

    def _keep_before(self, saved: int) -> None:
        """Link RUN/best as RUN/best.before if it is that of the last checkpoint; without hard links, rename it."""
        present = read_model_record(self.run.best)
        if present is None or present["step"] > saved:
            return
        remove(self.before)
        try:
            with atomic_directory(self.before) as work:
                shutil.copytree(self.run.best, work, copy_function=os.link, dirs_exist_ok=True)
        except Exception:
            with writing(self.before):
                self.run.best.rename(self.before)

    def _begin_anew(self, step: int) -> None:
        """Forget `record`, since the sets are others now; its weights are kept under another name."""
        assert self.record is not None
        best = self.run.best
        destination = self.run.path / f"best.step_{self.record['step']}"

        def rename() -> bool:
            if not best.is_dir() or destination.exists():
                return False
            best.rename(destination)
            return True

        note = f"; {best} of step {self.record['step']} is now {destination}" if on_first_rank(rename) else ""
        self.log(f"step {step}: the evaluation sets or settings changed: the best is chosen anew{note}")
        self.record = None


def _hash_of_sets(results: Sequence[EvaluationResult]) -> str:
    """A hash of the evaluation sets and of how they are sampled and graded, whatever the weights."""
    of_weights = ("step", "weights", "training_step")
    identities = [{k: v for k, v in (r.identity or {}).items() if k not in of_weights} for r in results]
    return hashlib.sha256(json.dumps(identities, sort_keys=True).encode()).hexdigest()
