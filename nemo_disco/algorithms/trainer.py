"""The training loop, with NeMo-Aligner's verbs: generate rollouts, train on mini-batches, refit the engine, repeat.

Connects packages that do not import each other; computes nothing. Every rank runs the same loop on the same data, and
rank 0 alone writes files and prints.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_disco import checkpoint
from nemo_disco.algorithms.agreement import Agreement
from nemo_disco.algorithms.best_weights import BestWeights
from nemo_disco.algorithms.divergence import MAX_SKIPPED, Divergence
from nemo_disco.algorithms.journal import Journal, TokenValues
from nemo_disco.algorithms.objectives import Objective
from nemo_disco.algorithms.objectives.mini_batch import NonFiniteError
from nemo_disco.algorithms.solved_questions import SolvedQuestions
from nemo_disco.algorithms.step import OldValues, accumulate_gradient, measure_kl
from nemo_disco.algorithms.step_metrics import summarize_step
from nemo_disco.algorithms.throughput import Throughput
from nemo_disco.algorithms.training_warnings import TrainingWarnings
from nemo_disco.algorithms.validation import Validation
from nemo_disco.checkpoint import CheckpointWriter
from nemo_disco.config.schema import AlgorithmConfig, ExpManagerConfig, TrainerConfig
from nemo_disco.data.rollouts import Rollouts
from nemo_disco.evaluation.result import EvaluationResult
from nemo_disco.generation.engine import Engine
from nemo_disco.policy.policy import Policy
from nemo_disco.policy.reference import Reference
from nemo_disco.rollout.collector import Collector, RolloutBatch
from nemo_disco.runtime.collectives import on_first_rank
from nemo_disco.runtime.errors import DivergedError
from nemo_disco.runtime.sinks import strict_metrics
from nemo_disco.runtime.spans import profile_block, record_spans, recorded_seconds, span
from nemo_disco.runtime.stop_signals import StoppedError, StopRequest


@dataclass(eq=False)
class Trainer:
    """One training run: fit, generate_rollouts, run_training, run_validation, save, state_dict, load_state_dict."""

    config: TrainerConfig
    exp_manager: ExpManagerConfig
    algorithm: AlgorithmConfig
    policy: Policy
    engine: Engine
    objective: Objective
    collector: Collector
    validation: Validation
    agreement: Agreement
    throughput: Throughput
    warnings: TrainingWarnings
    journal: Journal
    reference: Reference | None = None  # for an objective that needs reference_log_probs
    asynchronous: bool = False  # the engine samples the next step while the policy trains (generation.asynchronous)

    def __post_init__(self) -> None:
        self.writer = CheckpointWriter()
        self.step = self.saved = 0
        self.first_beta = self.objective.constraint.strength  # with which a dual constraint begins
        self.divergence = Divergence(self.policy)
        self.solved_questions = SolvedQuestions()
        self.best = BestWeights(self.journal.run, self.journal.log)
        self.stop = StopRequest()
        # Metrics of a step whose evaluation has not ended: a resumed run ends it, then writes them.
        self.unfinished: dict[str, Any] | None = None

    # --- the loop ---

    def fit(self) -> None:
        """Train to trainer.max_steps, or to the step in which a signal asked to stop; save what may be kept."""
        limit = self.config.max_steps
        self.engine.update_weights(self.policy.named_weights, self.step)
        written = self.unfinished is None or on_first_rank(lambda: self.journal.has_step(self.step))
        with self.stop, self.journal.open(limit, self.step if written else self.step - 1), self.writer:
            self.saved = self.step
            if self.step == 0:
                if sets := self.validation.sets:  # a wrong engine is refused before hours of evaluation
                    self.agreement.check_engine(self.engine, sets[0], self.validation.temperature)
                self._evaluate()
            elif self.unfinished is not None:
                self._finish_step(written=written)
            if self.step >= limit and written:
                self.journal.log(f"step {self.step} of {limit}: nothing is left to train")
            while self.step < limit and not self._must_stop():
                try:
                    self.unfinished = self.train_step()
                except StoppedError:
                    self.journal.log(f"step {self.step + 1} is given up: its rewards would take too long")
                    continue
                if not self._validation_is_due():
                    self._finish_step()
                if self._checkpoint_is_due():
                    self.save()  # before the evaluation, during which a time limit may end the process
                if self.unfinished is not None:
                    self._finish_step()
            if self.saved != self.step:
                self._save_at_stop()
            self.writer.wait()
            self.best.release(self.saved)
            if not self.finished:
                self._log_stop()

    def close(self) -> None:
        """End the processes that only this run needs: those of a user's reward functions."""
        self.collector.close()

    @property
    def finished(self) -> bool:
        """True if every step was taken and the last one evaluated."""
        return self.step >= self.config.max_steps and self.unfinished is None

    def train_step(self) -> dict[str, Any]:
        """One step: rollouts, then a gradient step a mini-batch, then the new weights into the engine. Asynchronously,
        the engine samples the next step's rollouts meanwhile, from the weights that this step began with."""
        with record_spans() as seconds:
            with self._profile_step(), span("step"):
                metrics = self._train_step()
            return metrics | {f"time/{name}": value for name, value in seconds.items()}

    def _train_step(self) -> dict[str, Any]:
        batch = self.generate_rollouts()
        values = TokenValues(self.journal.saved_rows(len(batch.texts)))
        if not self.asynchronous:
            self.engine.sleep()
        elif self.step + 1 < self.config.max_steps:
            self.collector.request_ahead(self.step + 1)
        try:
            metrics = {**batch.counts} | self.run_training(batch.rollouts, values)
        finally:  # also when the step fails, so that its responses can be read
            self.journal.write_rollouts(self.step + 1, batch, values)
        self.step += 1
        self._warn(batch, metrics)
        self._renew_reference()
        if self._checkpoint_is_due() or self._validation_is_due():
            self._refuse_faulty_weights()  # now, while the engine sleeps
        self.collector.receive(self.step)
        with span("refit"):
            if not self.asynchronous:
                self.engine.wake()
            self.engine.update_weights(self.policy.named_weights, self.step)
        return metrics

    def generate_rollouts(self) -> RolloutBatch:
        """Sample G responses to each of this step's questions, and reward them."""
        with nullcontext() if self.asynchronous else self.policy.resting():
            return self.collector.collect(self.step)

    def run_training(self, rollouts: Rollouts, values: TokenValues | None = None) -> dict[str, Any]:
        """Take a gradient step on each mini-batch of the rollouts; returns the step's metrics.

        values: takes the saved responses' token values. Raises UserError at the first step if engine and policy
        disagree on the log-probs, and after MAX_SKIPPED skipped mini-batches in a row.
        """
        with span("log_probs"):
            reference = None if self.reference is None else self.reference.log_probs(rollouts)
            old = OldValues.compute(self.policy, self.objective, rollouts, reference)
        if warning := self.agreement.check_step(self.step, rollouts, old.log_probs):
            self.journal.log(warning)
        history: list[dict[str, float]] = []
        last = None
        for responses in self._mini_batches(rollouts):
            part = rollouts.select(responses)
            old_part = old.select(rollouts, responses)
            self.divergence.begin(part, old_part.log_probs)
            try:
                result = accumulate_gradient(self.policy, self.objective, part, old_part, first=not history)
            except NonFiniteError as error:
                self._skip(str(error))
                continue
            self.throughput.add(part)
            with span("train"):
                update = self.policy.step()
            if not update.applied:
                self._skip(f"the gradient's norm is {update.grad_norm}")
                continue
            self.divergence.record_update()
            if values is not None:
                values.add(responses, part, result, old_part.log_probs)
            clip = self.config.gradient_clip_val
            clipped = {"grad_norm/clipped": float(0 < clip < update.grad_norm)}
            history.append(result.metrics | {"grad_norm": update.grad_norm, "lr": update.lr} | clipped)
            last = responses
        kl_after = self._measure_kl(rollouts, last, old)
        seconds = recorded_seconds()
        speed = self.throughput.metrics(seconds["train"], seconds["log_probs"] + seconds["train"])
        summary = summarize_step(rollouts, old, history, step=self.step, skipped=self.divergence.skipped)
        return summary | kl_after | self.solved_questions.update(rollouts) | speed

    def run_validation(self) -> list[EvaluationResult] | None:
        """Score the present weights on every evaluation set; None if the run was asked to stop meanwhile."""
        return self.validation.run(self.step, self._must_stop)

    # --- state ---

    def save(self) -> None:
        """Begin to write a checkpoint of everything that decides the future; `fit` waits for it. A collective."""
        self.journal.run.check_lock()
        # A run whose last mini-batches were skipped may have diverged: the checkpoints from before stay.
        keep = self.exp_manager.keep_checkpoints if self.divergence.in_a_row == 0 else sys.maxsize
        checkpoints = self.journal.run.checkpoints
        self.writer.wait()
        self.best.release(self.saved)
        self.writer.save(self.policy, checkpoints, self.step, self.state_dict(), keep, self.reference)
        self.saved = self.step
        self.divergence.record_checkpoint()

    def state_dict(self) -> dict[str, Any]:
        """The loop's own state, as JSON; a checkpoint saves weights, optimizer and torch's RNG beside it."""
        return {
            "step": self.step,
            "best": self.best.record,
            "dual": {"began": self.first_beta, "beta": self.objective.constraint.strength},
            "questions": self.solved_questions.state_dict(),
            "warnings": self.warnings.state_dict(),
            "unfinished": None if self.unfinished is None else strict_metrics(self.unfinished),
            **self.divergence.state_dict(),
            **self.collector.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a checkpoint's state. Raises UserError if the questions have changed since (data.if_changed)."""
        self.step = state["step"]
        self.collector.load_state_dict(state)
        self.divergence.load_state_dict(state)
        self.best.load_state(state.get("best"), self.step)
        self.unfinished = state.get("unfinished")
        self.solved_questions.load_state_dict(state.get("questions", {}))
        self.warnings.load_state_dict(state.get("warnings", {}))
        dual = state.get("dual", {})
        if dual.get("began") == self.first_beta:  # else the settings have another beta now, which is where it begins
            constraint = self.objective.constraint.with_multiplier(dual["beta"])
            self.objective = replace(self.objective, constraint=constraint)

    # --- parts ---

    def _measure_kl(self, rollouts: Rollouts, last: Tensor | None, old: OldValues) -> dict[str, float]:
        """Measure the KL of the step's last update, and set a dual constraint's multiplier by it. A collective.

        last: indices of the responses of the last mini-batch that was applied; None: the KL is not a number. Measured
        on at most a quarter of the step's questions, so that it costs little where a step is one mini-batch too.
        """
        kl = float("nan") if last is None else self._kl_after(rollouts, last, old)
        constraint = self.objective.constraint
        self.objective = replace(self.objective, constraint=constraint.ascend(kl))
        return {"policy/kl_after": kl} | (
            {"constraint/kl_after_over_delta": kl / delta} if (delta := constraint.limit) else {}
        )

    def _kl_after(self, rollouts: Rollouts, last: Tensor, old: OldValues) -> float:
        questions = list(dict.fromkeys(rollouts.question_ids[last].tolist()))
        limit = max(1, len(set(rollouts.question_ids.tolist())) // 4)
        part = last[torch.isin(rollouts.question_ids[last], torch.tensor(questions[:limit]))]
        with span("log_probs"):
            return measure_kl(self.policy, rollouts.select(part), old.select(rollouts, part))

    def _profile_step(self) -> AbstractContextManager[None]:
        if self.step + 1 not in self.exp_manager.profile_steps:
            return nullcontext()
        return profile_block(self.journal.run.profile / f"step_{self.step + 1}", dist.get_rank())

    def _renew_reference(self) -> None:
        """STILL-3: every algorithm.reference_reset_steps steps the policy becomes the reference."""
        every = self.algorithm.reference_reset_steps
        if self.reference is not None and every and self.step % every == 0 and not self.divergence.in_a_row:
            self.reference.become(self.policy)
            self.journal.log(f"step {self.step}: the policy becomes the reference from here on")

    def _mini_batches(self, rollouts: Rollouts) -> list[Tensor]:
        """The indices of each mini-batch's responses: whole questions, in the order in which they were sampled."""
        size = self.algorithm.mini_batch_questions
        questions = list(dict.fromkeys(rollouts.question_ids.tolist()))
        return [
            torch.isin(rollouts.question_ids, torch.tensor(questions[i : i + size])).nonzero()[:, 0]
            for i in range(0, len(questions), size)
        ]

    def _validation_is_due(self) -> bool:
        every = self.validation.every_n_steps
        return self.step == self.config.max_steps or (every > 0 and self.step % every == 0)

    def _checkpoint_is_due(self) -> bool:
        """True if a checkpoint is due, one that was put off included, and the present weights may be kept."""
        every = self.exp_manager.checkpoint_every_n_steps
        due = self.step // every > self.saved // every or self.step == self.config.max_steps
        return due and self._may_keep_weights()

    def _may_keep_weights(self) -> bool:
        """False while mini-batches are being skipped; but True at the end of a run, after which nothing follows."""
        return self.divergence.in_a_row == 0 or self.step == self.config.max_steps

    def _finish_step(self, written: bool = False) -> None:
        """Evaluate if that is due, then write the step's metrics; neither if the run is asked to stop first.

        written: True if an earlier process did both; its results are read, for the best weights so far."""
        assert self.unfinished is not None
        with record_spans() as seconds, span("evaluate"):
            results = self._evaluate() if self._validation_is_due() else []
        if results is None:
            return
        if not written:
            scores = {name: value for result in results for name, value in result.metrics().items()}
            self.journal.write_step(self.step, self.unfinished | scores | {"time/evaluate": seconds["evaluate"]})
        self.unfinished = None

    def _evaluate(self) -> list[EvaluationResult] | None:
        """As run_validation; also keep the weights, except step 0's, as RUN/best if all earlier scores were lower."""
        results = self.run_validation()
        # Without evaluations during training there is no choice: the weights are export/'s.
        chooses = self.step == 0 or (self.validation.every_n_steps > 0 and self._may_keep_weights())
        if results and chooses and self.best.consider(self.step, results) and self.step:
            self.writer.wait()
            self.journal.run.check_lock()
            self.best.keep(self.policy, self.saved)
        return results

    def _warn(self, batch: RolloutBatch, metrics: dict[str, Any]) -> None:
        """Log what is wrong with the step, each kind once in the run."""
        for warning in self.warnings.new_warnings(batch.texts, metrics, self.objective.constraint):
            self.journal.log(f"step {self.step}: warning: {warning}")

    def _save_at_stop(self) -> None:
        """Save the step after which the run was asked to stop, unless its last mini-batch was skipped. A collective."""
        if not self._may_keep_weights():
            self.journal.log(f"step {self.step} is not saved: its last mini-batch was skipped")
            return
        if not self.asynchronous:
            self.engine.sleep()  # nothing is sampled any more
        self._refuse_faulty_weights()
        self.save()

    def _log_stop(self) -> None:
        progress = f"saved step {self.saved}" if self.saved else "nothing is saved yet"
        progress = progress if self.step else "before the first step"
        progress += ", whose evaluation has not finished" if self.step and self.unfinished is not None else ""
        self.journal.log(f"asked to stop by {self.stop.signal_name}: {progress}; the same command continues the run")

    def _refuse_faulty_weights(self) -> None:
        """Raises DivergedError if the weights, which are about to be kept, have a fault. A collective."""
        if fault := self.divergence.find_fault():
            raise self._divergence_error(self.step, fault)

    def _skip(self, reason: str) -> None:
        """Count a mini-batch that is not applied. Raises DivergedError after MAX_SKIPPED in a row."""
        ends = self.divergence.skip()
        self.journal.log(
            f"step {self.step + 1}: a mini-batch was skipped ({self.divergence.skipped} so far): {reason}; nothing is "
            "saved until one is applied"
        )
        if ends:
            raise self._divergence_error(
                self.step + 1, f"{MAX_SKIPPED} mini-batches in a row had no finite gradient ({reason})"
            )

    def _divergence_error(self, step: int, reason: str) -> DivergedError:
        """The error that ends a run that has diverged. A collective."""
        self.writer.wait()
        last = checkpoint.latest(self.journal.run.checkpoints)
        if last is None:
            advice = "there is no checkpoint yet"
        elif self.divergence.updated_since_checkpoint:
            advice = f"the last checkpoint, {last}, is from before that and was kept"
        else:
            advice = f"none was applied since {last}: if that one is at fault, remove it to resume from an earlier one"
        return DivergedError(f"step {step}: {reason}; {advice}; lower model.optim.lr, then start again")

    def _must_stop(self) -> bool:
        """True if any rank was signalled or cannot save: all must leave the loop after the same step. A collective."""
        votes = torch.tensor([self.stop.number, int(self.writer.failed)], device=self.policy.device)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        number, failed = votes.tolist()
        self.stop.number = self.stop.number or number  # another rank's signal is named here too
        return bool(number or failed)
