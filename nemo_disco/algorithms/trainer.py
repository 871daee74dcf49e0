"""The loop, in NeMo-Aligner's shape: generate, grade, train on mini-batches, put the weights into the engine, repeat.

Wires rooms that do not know each other; computes nothing itself. Every rank runs the same loop on the same data, and
rank 0 alone writes files and talks.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist

from nemo_disco import checkpoint
from nemo_disco.algorithms.agreement import Agreement, check_engine
from nemo_disco.algorithms.best_weights import BestWeights
from nemo_disco.algorithms.divergence import MAX_SKIPPED, Divergence
from nemo_disco.algorithms.journal import Journal
from nemo_disco.algorithms.mismatch import noise_warning
from nemo_disco.algorithms.objectives import Objective
from nemo_disco.algorithms.objectives.mini_batch import NonFiniteError
from nemo_disco.algorithms.step import OldPolicy, accumulate_gradient
from nemo_disco.algorithms.step_metrics import summary
from nemo_disco.algorithms.throughput import Throughput
from nemo_disco.algorithms.token_values import TokenValues
from nemo_disco.algorithms.validation import Validation
from nemo_disco.checkpoint.writer import CheckpointWriter
from nemo_disco.config.schema import RunConfig
from nemo_disco.data.question_order import QuestionOrder
from nemo_disco.data.rollouts import Rollouts
from nemo_disco.estimate.flops import peak_flops
from nemo_disco.evaluation.result import EvaluationResult
from nemo_disco.generation.engine import Engine
from nemo_disco.models.shape import read_shape
from nemo_disco.policy.policy import Policy
from nemo_disco.policy.reference import Reference
from nemo_disco.rewards.registry import Grader
from nemo_disco.rollout.collector import Collector, RolloutBatch
from nemo_disco.rollout.prompts import PromptSet
from nemo_disco.rollout.response_warnings import ResponseWarnings
from nemo_disco.runtime.clock import Clock, device_clock
from nemo_disco.runtime.collectives import first
from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.profiler import profiled
from nemo_disco.runtime.signals import StoppedError, StopRequest
from nemo_disco.runtime.sinks import strict_metrics

log = logging.getLogger(__name__)


class Trainer:
    """One training run: fit, generate_rollouts, run_training, run_validation, save, state_dict, load_state_dict."""

    def __init__(
        self,
        config: RunConfig,
        *,
        policy: Policy,
        engine: Engine,
        objective: Objective,
        grader: Grader,
        prompts: PromptSet,
        order: QuestionOrder,
        evaluation_sets: Sequence[PromptSet],
        journal: Journal,
        reference: Reference | None = None,
    ) -> None:
        """reference: for an objective that needs reference_log_probs."""
        self.config, self.policy, self.engine, self.objective = config, policy, engine, objective
        self.grader, self.evaluation_sets, self.journal = grader, evaluation_sets, journal
        self.reference = reference
        self.collector = Collector(
            config,
            engine=engine,
            grader=grader,
            prompts=prompts,
            order=order,
            say=journal.say,
            remembers="shortest_correct" in objective.needs,
        )
        self.shape = read_shape(config.model.path)
        self.writer = CheckpointWriter()
        self.step = self.saved = 0
        self.divergence = Divergence(policy)
        self.agreement = Agreement(config, policy, prompts.tokenizer, journal.say)
        self.warned_of_noise = False
        self.warnings = ResponseWarnings(config.reward.require_think)
        self.validation = Validation(config, engine=engine, grader=grader, sets=evaluation_sets, journal=journal)
        self.best = BestWeights(journal.run, journal.say)
        self.stop = StopRequest()
        # The metrics of a step whose evaluation has not ended: the next life ends it, then writes them.
        self.unfinished: dict[str, Any] | None = None

    # --- the loop ---

    def fit(self) -> None:
        """Train to trainer.max_steps, or to the step in which a signal asked to stop; save in any case."""
        limit = self.config.trainer.max_steps
        self.engine.update_weights(self.policy.named_weights, self.step)
        there = self.unfinished is None or first(lambda: self.journal.has(self.step))
        with self.stop, self.journal.watch(limit, self.step if there else self.step - 1), self.writer:
            self.saved = self.step
            if self.step == 0:
                if self.evaluation_sets:  # a wrong engine is refused before hours of evaluation
                    check_engine(self.config, self.policy, self.engine, self.evaluation_sets[0])
                self._evaluate()
            elif self.unfinished is not None:
                self._finish_step(written=there)
            if self.step >= limit and there:
                self.journal.say(f"step {self.step} of {limit}: nothing is left to train")
            while self.step < limit and not self._stops():
                try:
                    self.unfinished = self.train_step()
                except StoppedError:
                    self.journal.say(f"step {self.step + 1} is given up: its rewards would take too long")
                    continue
                if not self._validates():
                    self._finish_step()
                if self._saves():
                    self.save()  # before the evaluation, which may take longer than this process lives
                if self.unfinished is not None:
                    self._finish_step()
            if self.saved != self.step:
                self._save_at_stop()
            self.writer.wait()
            self.best.release(self.saved)
            if not self.finished:
                done = f"saved step {self.saved}" if self.saved else "nothing is saved yet"
                done = done if self.step else "before the first step"
                done += ", whose evaluation has not finished" if self.step and self.unfinished is not None else ""
                self.journal.say(f"asked to stop by {self.stop.signal_name}: {done}; start again to go on")

    def close(self) -> None:
        """End what only this run needs: the processes of a user's reward functions."""
        self.collector.rewards.close()

    @property
    def finished(self) -> bool:
        """Whether every step was taken, and the last one evaluated."""
        return self.step >= self.config.trainer.max_steps and self.unfinished is None

    def train_step(self) -> dict[str, Any]:
        """One step: rollouts, then a gradient step a mini-batch, then the new weights into the engine. Asynchronously,
        the engine samples the next step's rollouts meanwhile, from the weights that this step began with."""
        clock = device_clock()
        asynchronous = self.config.generation.asynchronous
        with self._profiled(), clock("step"):
            sampled = self.generate_rollouts(clock)
            values = TokenValues(self.journal.saved(len(sampled.texts)))
            if not asynchronous:
                self.engine.sleep()
            elif self.step + 1 < self.config.trainer.max_steps:
                self.collector.ask(self.step + 1)
            try:
                metrics = {**sampled.counts} | self.run_training(sampled.rollouts, clock, values)
            finally:  # those of a step that fails are there to read too
                self.journal.rollouts(self.step + 1, sampled, values)
            self.step += 1
            self._warn_of_noise(metrics["policy/noise_floor"])
            for warning in self.warnings.about(sampled.texts, metrics["groups/mixed"]):
                self.journal.say(f"step {self.step}: warning: {warning}")
            self._renew_reference()
            if self._saves() or self._validates():
                self._refuse_unsound()  # now, while the engine sleeps
            self.collector.receive(self.step, clock)
            with clock("refit"):
                if not asynchronous:
                    self.engine.wake()
                self.engine.update_weights(self.policy.named_weights, self.step)
        return metrics | {f"time/{name}": seconds for name, seconds in clock.seconds.items()}

    def generate_rollouts(self, clock: Clock) -> RolloutBatch:
        """Sample G responses to each of this step's questions, and reward them."""
        with nullcontext() if self.config.generation.asynchronous else self.policy.resting():
            return self.collector.collect(self.step, clock)

    def run_training(self, rollouts: Rollouts, clock: Clock, values: TokenValues | None = None) -> dict[str, Any]:
        """A gradient step on each mini-batch of the rollouts; the step's metrics. values: what takes the tokens'.
        Raises UserError at the first step if the engine's log-probs are not the policy's."""
        with clock("log_probs"):
            reference = None if self.reference is None else self.reference.log_probs(rollouts)
            old = OldPolicy(*self.policy.log_probs(rollouts, entropies=True), reference)
        self.agreement.check_step(self.step, rollouts, old.log_probs)
        history: list[dict[str, float]] = []
        throughput = Throughput(self.shape, dist.get_world_size(), peak_flops(self.policy.device_name))
        moved = False
        for responses in self._mini_batches(rollouts):
            part = rollouts.select(responses)
            old_part = old.at(rollouts.token_index(responses))
            self.divergence.begin(part, old_part.log_probs)
            try:
                taken = accumulate_gradient(
                    self.policy,
                    self.objective,
                    part,
                    old_part,
                    max_response_length=self.config.generation.response_limit(self.step),
                    first=not moved,
                    clock=clock,
                )
            except NonFiniteError as error:
                self._skip(str(error))
                continue
            throughput.trained(part)
            with clock("train"):
                result = self.policy.step()
            if not result.applied:
                self._skip(f"the gradient's norm is {result.grad_norm}")
                continue
            moved = True
            self.divergence.applied()
            if values is not None:
                values.take(responses, part, taken, old_part.log_probs)
            history.append(taken.metrics | {"grad_norm": result.grad_norm, "lr": result.lr})
        clock.seconds["log_probs"] += clock.seconds["pass1"]
        seconds = clock.seconds
        speed = throughput.metrics(seconds["train"], seconds["log_probs"] + seconds["train"])
        limit, skipped = self.config.generation.response_limit(self.step), self.divergence.skipped
        return summary(rollouts, old, history, step=self.step, limit=limit, skipped=skipped) | speed

    def run_validation(self) -> list[EvaluationResult] | None:
        """Score the present weights on every evaluation set; None if the run was asked to stop meanwhile."""
        return self.validation.run(self.step, self._stops)

    # --- state ---

    def save(self) -> None:
        """Begin to write a checkpoint of everything that decides the future; `fit` waits for it. A collective."""
        self.journal.run.check_held()
        # A run whose last mini-batches were skipped may have diverged: the checkpoints from before stay.
        keep = self.config.exp_manager.keep_checkpoints if self.divergence.in_a_row == 0 else sys.maxsize
        checkpoints = self.journal.run.checkpoints
        self.writer.wait()
        self.best.release(self.saved)
        self.writer.save(self.policy, checkpoints, self.step, self.state_dict(), keep, self.reference)
        self.saved = self.step
        self.divergence.saved()

    def state_dict(self) -> dict[str, Any]:
        """The loop's own state, as JSON; weights, optimizer and torch's RNG are the checkpoint's."""
        return {
            "step": self.step,
            "best": self.best.chosen,
            "unfinished": None if self.unfinished is None else strict_metrics(self.unfinished),
            **self.divergence.state_dict(),
            **self.collector.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.collector.load_state_dict(state)
        self.divergence.load_state_dict(state)
        self.best.load_state(state.get("best"), self.step)
        self.unfinished = state.get("unfinished")

    # --- parts ---

    def _profiled(self) -> AbstractContextManager[None]:
        if self.step + 1 not in self.config.exp_manager.profile_steps:
            return nullcontext()
        return profiled(self.journal.run.profile / f"step_{self.step + 1}", dist.get_rank())

    def _renew_reference(self) -> None:
        """STILL-3: every so many steps the policy becomes the reference."""
        every = self.config.algorithm.reference_reset_steps
        if self.reference is not None and every and self.step % every == 0 and not self.divergence.in_a_row:
            self.reference.become(self.policy)
            self.journal.say(f"step {self.step}: the policy of now is the reference from here on")

    def _mini_batches(self, rollouts: Rollouts) -> list[torch.Tensor]:
        """The responses of each mini-batch: whole questions, in the order in which they were sampled."""
        size = self.config.algorithm.mini_batch_questions
        questions = list(dict.fromkeys(rollouts.question_ids.tolist()))
        return [
            torch.isin(rollouts.question_ids, torch.tensor(questions[i : i + size])).nonzero()[:, 0]
            for i in range(0, len(questions), size)
        ]

    def _validates(self) -> bool:
        every = self.config.evaluation.every_n_steps
        return self.step == self.config.trainer.max_steps or (every > 0 and self.step % every == 0)

    def _finish_step(self, written: bool = False) -> None:
        """Evaluate where that is due, then write the step's metrics; neither where the run is asked to stop first.

        written: an earlier life did both, and its results are read, for the best weights so far."""
        assert self.unfinished is not None
        clock = device_clock()
        with clock("evaluate"):
            results = self._evaluate() if self._validates() else []
        if results is not None and written:
            self.unfinished = None
        elif results is not None:
            scores = {name: value for result in results for name, value in result.metrics().items()}
            self.journal.stepped(self.step, self.unfinished | scores | {"time/evaluate": clock.seconds["evaluate"]})
            self.unfinished = None

    def _evaluate(self) -> list[EvaluationResult] | None:
        """As run_validation, and keep the weights as RUN/best where no evaluation during training was better."""
        results = self.run_validation()
        # Without evaluations during training there is no choice: the weights are export/'s.
        chooses = self.step == 0 or (self.config.evaluation.every_n_steps > 0 and self._keeps())
        if results and chooses and self.best.consider(self.step, results) and self.step:
            self.writer.wait()
            self.journal.run.check_held()
            self.best.keep(self.policy, self.saved)
        return results

    def _warn_of_noise(self, noise: float) -> None:
        """Log the warning about rounding noise, once in the life of the process."""
        warning = noise_warning(noise, self.objective.constraint)
        if warning and not self.warned_of_noise:
            self.warned_of_noise = True
            self.journal.say(f"step {self.step}: warning: {warning}")

    def _saves(self) -> bool:
        """Whether a checkpoint is due, one that was put off included, and the present weights may be kept."""
        every = self.config.exp_manager.checkpoint_every_n_steps
        due = self.step // every > self.saved // every or self.step == self.config.trainer.max_steps
        return due and self._keeps()

    def _keeps(self) -> bool:
        """Not while mini-batches are being skipped; the end of a run is the exception, as nothing follows."""
        return self.divergence.in_a_row == 0 or self.step == self.config.trainer.max_steps

    def _save_at_stop(self) -> None:
        """Save the step after which the run was asked to stop. A collective."""
        if not self._keeps():
            self.journal.say(f"step {self.step} is not saved: its last mini-batch was skipped")
            return
        if not self.config.generation.asynchronous:
            self.engine.sleep()  # nothing is sampled any more
        self._refuse_unsound()
        self.save()

    def _refuse_unsound(self) -> None:
        """Raises UserError if the weights, which are about to be kept, are of no use. A collective."""
        if fault := self.divergence.fault():
            raise self._diverged(self.step, fault)

    def _skip(self, why: str) -> None:
        """Count a mini-batch that is not applied. Raises UserError after MAX_SKIPPED in a row."""
        over = self.divergence.skip()
        self.journal.say(
            f"step {self.step + 1}: a mini-batch was skipped ({self.divergence.skipped} so far): {why}; nothing is "
            "saved until one is applied"
        )
        if over:
            raise self._diverged(self.step + 1, f"{MAX_SKIPPED} mini-batches in a row had no finite gradient ({why})")

    def _diverged(self, step: int, why: str) -> UserError:
        """The error that ends a run that has diverged. A collective."""
        self.writer.wait()
        last = checkpoint.latest(self.journal.run.checkpoints)
        if last is None:
            left = "there is no checkpoint yet"
        elif self.divergence.moved:
            left = f"the last checkpoint, {last}, is from before it and was kept"
        else:
            left = f"none was applied since {last}: if that one is at fault, remove it to go on from an earlier one"
        return UserError(f"step {step}: {why}; {left}; lower model.optim.lr, then start again")

    def _stops(self) -> bool:
        """Whether any rank was signalled, or cannot save: all must leave the loop after the same step. A collective."""
        votes = torch.tensor([self.stop.number, int(self.writer.failed)], device=self.policy.device)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        number, failed = votes.tolist()
        self.stop.number = self.stop.number or number  # another rank's: that it is the one that is named
        return bool(number or failed)
