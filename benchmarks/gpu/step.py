"""A whole DisCO step at the 1.5B shape on this one device, by part: generate, log-probs, pass 1, train, and the share
of the exact pass in the training part."""

from __future__ import annotations

from typing import Any

import torch
from setting import (
    TEMPERATURE,
    Setting,
    build_policy,
    made_up_rollouts,
    model_directory,
    peak_gb,
    reset_peak,
    with_policy_scores,
)
from train_shapes import rates

from nemo_disco.algorithms import build_objective
from nemo_disco.algorithms.step import OldValues, accumulate_gradient
from nemo_disco.data.rollouts import Rollouts
from nemo_disco.generation.engine import SamplingParams
from nemo_disco.generation.megatron.engine import MegatronEngine
from nemo_disco.runtime.timing import record_spans, span


def run(setting: Setting) -> dict[str, Any]:
    """8 questions x 8 responses up to 4096 tokens trained on in 4 mini-batches; sampling is timed at 256 tokens (random
    weights never end a response), with the gradient's memory given back and the optimizer's state on the host."""
    shape, sizes = setting.shape("1p5b"), setting.rollout_sizes("step")
    rollouts = made_up_rollouts(shape.vocab, sizes)
    tokens = setting.step_sampling()[2]
    with model_directory(shape) as path:
        policy = build_policy(path, setting.size(16896, 200), **{"optim.offload": "true"})
    engine = MegatronEngine(policy, [shape.vocab])
    reset_peak()
    _train(policy, rollouts)  # compiles, and allocates the optimizer's state
    with policy.resting():  # allocates its place on the host
        pass
    with record_spans() as seconds, span("step"):
        with span("rest"), policy.resting(), span("generate"):
            prompts = [rollouts.prompt(i).tolist() for i in range(len(rollouts))]
            engine.generate(prompts, range(len(prompts)), SamplingParams(TEMPERATURE, tokens))
        _train(policy, rollouts)
    spans = dict(seconds)
    part = spans["log_probs"] + spans["train"]
    return {
        "seconds": spans,
        "offload_seconds": spans["rest"] - spans["generate"],
        "exact_pass_share": spans["pass1"] / part,
        "training_part_tokens_per_second": int(rollouts.total_lengths.sum()) / part,
        "train": rates(setting, shape, rollouts, spans["train"]),
        "peak_gb": peak_gb(),
    }


def _train(policy: Any, rollouts: Rollouts) -> None:
    """The training part of a step, as algorithms/trainer.py has it; log_probs holds the old ones and pass 1."""
    objective = build_objective({"name": "disco"})
    with span("log_probs"):
        old = OldValues(*policy.log_probs(rollouts, entropies=True))
    rollouts = with_policy_scores(rollouts, old.log_probs)
    questions = rollouts.question_ids.unique()
    for i, ids in enumerate(questions.chunk(Setting.MINI_BATCHES)):
        responses = torch.isin(rollouts.question_ids, ids).nonzero()[:, 0]
        accumulate_gradient(
            policy,
            objective,
            rollouts.select(responses),
            old.select(rollouts.token_index(responses)),
            first=i == 0,
        )
        with span("train"):
            assert policy.step().applied
