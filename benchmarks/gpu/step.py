"""Seconds of a whole DisCO step at the 1.5B shape on one device: sampling, old log-probs, pass 1 and pass 2.

Also pass 1's share (`exact_pass_share`) of the training part, which is the step without sampling.
"""

from __future__ import annotations

from typing import Any

import torch
from setting import (
    TEMPERATURE,
    Setting,
    build_policy,
    make_random_rollouts,
    model_directory,
    peak_gb,
    reset_peak,
    with_generation_log_probs,
)
from train_shapes import compute_rates

from nemo_disco.algorithms import build_objective
from nemo_disco.algorithms.step import OldValues, accumulate_gradient
from nemo_disco.data.rollouts import Rollouts
from nemo_disco.generation.engine import SamplingParams
from nemo_disco.generation.megatron.engine import MegatronEngine
from nemo_disco.runtime.spans import record_spans, span


def run(setting: Setting) -> dict[str, Any]:
    """Seconds by span, derived rates and peak memory of one step.

    It trains on 8 questions with 8 random responses of up to 4096 tokens, in 4 mini-batches. Sampling is timed apart:
    256 tokens in each row, since random weights never end a response, while the gradient's memory is free and the
    optimizer's state is on the host.
    """
    shape, sizes = setting.shape("1p5b"), setting.rollout_sizes("step")
    rollouts = make_random_rollouts(shape.vocab, sizes)
    tokens = setting.step_sampling_sizes()[2]
    with model_directory(shape) as path:
        policy = build_policy(path, setting.size(16896, 200), **{"optim.offload": "true"})
    engine = MegatronEngine(policy, [shape.vocab])
    reset_peak()
    _train(policy, rollouts)  # a warm-up: compiles, and allocates the optimizer's state
    with policy.resting():  # another: allocates memory for that state on the host
        pass
    with record_spans() as seconds, span("step"):
        with span("rest"), policy.resting(), span("generate"):
            prompts = [rollouts.prompt(i).tolist() for i in range(len(rollouts))]
            engine.generate(prompts, range(len(prompts)), SamplingParams(TEMPERATURE, tokens))
        _train(policy, rollouts)
    spans = dict(seconds)
    training_s = spans["log_probs"] + spans["train"]
    return {
        "seconds": spans,
        "offload_seconds": spans["rest"] - spans["generate"],
        "exact_pass_share": spans["pass1"] / training_s,
        "training_part_tokens_per_second": int(rollouts.total_lengths.sum()) / training_s,
        "train": compute_rates(setting, shape, rollouts, spans["train"]),
        "peak_gb": peak_gb(),
    }


def _train(policy: Any, rollouts: Rollouts) -> None:
    """Run the training part of a step as algorithms/trainer.py does. The span log_probs includes pass 1."""
    objective = build_objective({"name": "disco"})
    with span("log_probs"):
        old = OldValues.compute(policy, objective, rollouts, reference=None)
    rollouts = with_generation_log_probs(rollouts, old.log_probs)
    questions = rollouts.question_ids.unique()
    for i, ids in enumerate(questions.chunk(Setting.MINI_BATCHES)):
        responses = torch.isin(rollouts.question_ids, ids).nonzero()[:, 0]
        accumulate_gradient(
            policy,
            objective,
            rollouts.select(responses),
            old.select(rollouts, responses),
            first=i == 0,
        )
        with span("train"):
            assert policy.step().applied
