"""`nemo-disco verify`: one mini-batch on the present layout: do engine and trainer agree, and what is the gradient."""

from __future__ import annotations

import torch

from nemo_disco.algorithms.gradient_check import check_places, verify_mini_batch
from nemo_disco.commands.components import (
    build_components,
    build_run_objective,
    is_first_rank,
    process_groups,
    read_prompts,
)
from nemo_disco.config.schema import RunConfig
from nemo_disco.data.tokenizer import load_tokenizer


def main(config: RunConfig) -> int:
    """Print the report of one mini-batch. Raises UserError if engine and trainer disagree."""
    check_places(config.verify)
    objective = build_run_objective(config)
    dtype = getattr(torch, config.verify.dtype) if config.verify.dtype else None
    with process_groups(config):
        tokenizer = load_tokenizer(config.model.path, config.model.trust_remote_code)
        prompts = read_prompts("train", config.data.train_files, config, tokenizer)
        with build_components(config, tokenizer, dtype=dtype) as parts:
            parts.engine.update_weights(parts.policy.named_weights, 0)
            report = verify_mini_batch(config, parts.policy, parts.engine, parts.grader, objective, prompts)
            if is_first_rank():
                print(report)
    return 0
