"""TRL's side of whole_step.py: GRPOTrainer on the CPU, in TRL's environment, with one step of the loop in each turn.

A step of the loop is one generation and the optimizer steps on its responses. TRL itself calls each optimizer step a
step.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from common import Turns, as_text, grade_by_hash, make_prompts
from datasets import Dataset
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class TurnCallback(TrainerCallback):
    """Callback that waits for this side's turn before each generation and ends it after the last optimizer step."""

    def __init__(self, mini_batches: int) -> None:
        self.mini_batches = mini_batches
        self.turns = Turns()
        self.response_tokens = 0  # of the present turn; set by the reward function

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> Any:  # noqa: ARG002
        if state.global_step % self.mini_batches == 0 and not self.turns.wait():
            raise SystemExit(0)
        return control

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:  # noqa: ARG002
        if state.global_step % self.mini_batches == 0:
            self.turns.finish(response_tokens=self.response_tokens)
        return control


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    for name in ("questions", "group", "limit", "mini-batches"):
        parser.add_argument(f"--{name}", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    callback = TurnCallback(args.mini_batches)

    def grade(completions: Sequence[str], completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        callback.response_tokens = sum(map(len, completion_ids))
        return [grade_by_hash(completion) for completion in completions]

    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(dir=args.model),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_steps=10**6,  # the callback ends the process when there are no more turns
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        loss_type="grpo",
        num_generations=args.group,
        max_completion_length=args.limit,
        per_device_train_batch_size=args.questions * args.group // args.mini_batches,
        gradient_accumulation_steps=1,
        steps_per_generation=args.mini_batches,
        model_init_kwargs={"dtype": "float32"},
        dataloader_pin_memory=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        args.model,
        reward_funcs=grade,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": [as_text(prompt) for prompt in make_prompts(args.questions)]}),
        processing_class=PreTrainedTokenizerFast.from_pretrained(args.model),
        callbacks=[callback],
    )
    trainer.train()


if __name__ == "__main__":
    main()
