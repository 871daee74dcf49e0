"""`nemo-disco verify`: compare engine and trainer on one mini-batch, and compute its gradient on the present layout."""

from __future__ import annotations

from contextlib import closing

import torch

from nemo_disco.algorithms.agreement import Agreement
from nemo_disco.algorithms.gradient_check import check_output_directories, verify_mini_batch
from nemo_disco.commands import components
from nemo_disco.config.schema import RunConfig
from nemo_disco.data.question_order import QuestionOrder
from nemo_disco.data.tokenizer import load_tokenizer
from nemo_disco.runtime.collectives import is_first_rank


def main(config: RunConfig) -> int:
    """Print the report of one mini-batch. Raises UserError if engine and trainer disagree."""
    check_output_directories(config.verify)
    objective = components.build_run_objective(config)
    dtype = getattr(torch, config.verify.dtype) if config.verify.dtype else None
    with components.process_groups(config):
        tokenizer = load_tokenizer(config.model.path, config.model.trust_remote_code)
        components.check_compared_tokens(config, objective, tokenizer)
        prompts = components.read_prompts("train", config.data.train_files, config, tokenizer)
        per_step = config.algorithm.mini_batch_questions
        order = QuestionOrder(len(prompts), per_step, config.seed, config.data.shuffle)
        with components.build_components(config, tokenizer, dtype=dtype) as parts:
            parts.engine.update_weights(parts.policy.named_weights, 0)
            agreement = Agreement(config.verify, config.generation, parts.policy, tokenizer, "verify.dtype")
            with closing(components.build_collector(config, parts, objective, prompts, order, print)) as collector:
                report = verify_mini_batch(
                    config.verify,
                    parts.policy,
                    objective,
                    agreement,
                    sample=lambda: collector.collect(0).rollouts,
                    seed=config.seed,
                )
            if is_first_rank():
                print(report)
    return 0
