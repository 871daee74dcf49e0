"""`nemo-disco evaluate`: score model.path (a Hugging Face directory, a checkpoint, a run) on evaluation.files."""

from __future__ import annotations

from pathlib import Path

from nemo_disco.algorithms.agreement import Agreement
from nemo_disco.commands import components
from nemo_disco.config.schema import RunConfig
from nemo_disco.data.tokenizer import load_tokenizer
from nemo_disco.evaluation.papers import print_estimates, print_tables, read_reference
from nemo_disco.evaluation.result import evaluation_file, write_evaluation
from nemo_disco.models.shape import published_name
from nemo_disco.models.source import model_source
from nemo_disco.rollout.evaluation import weights_identity
from nemo_disco.rollout.response_warnings import ResponseWarnings
from nemo_disco.runtime.collectives import is_first_rank
from nemo_disco.runtime.rundir import RunDirectory


def main(config: RunConfig) -> int:
    """Write a result and every sample of each set to the run directory, and print the tables."""
    run = RunDirectory(config.exp_manager.explicit_log_dir)
    # In the directory of a training run the result must not be mistaken for the one before training.
    directory = run.path / "evaluate" if run.metrics.exists() else run.evaluation
    source = model_source(config.model.path)
    config = config.model_copy(update={"model": config.model.model_copy(update={"path": source.hugging_face})})
    reference = read_reference(Path(config.evaluation.reference)) if config.evaluation.reference else {}
    with components.process_groups(config), components.lock_run_directory(run):
        tokenizer = load_tokenizer(config.model.path, config.model.trust_remote_code)
        sets = components.read_evaluation_sets(config, tokenizer)
        with components.build_components(
            config, tokenizer, trainable=False, checkpoint_path=source.checkpoint
        ) as parts:
            parts.engine.update_weights(parts.policy.named_weights, 0)
            agreement = Agreement(config.verify, config.generation, parts.policy, tokenizer)
            agreement.check_engine(parts.engine, sets[0], config.evaluation.temperature)
            evaluator = components.build_evaluator(config, parts)
            warnings = ResponseWarnings(config.reward.require_think)
            results = []
            for prompts in sets:
                samples = evaluation_file(directory, prompts.name, source.step).with_suffix(".samples.jsonl")
                weights = weights_identity(source)
                run.check_lock()
                result = evaluator.evaluate(prompts, source.step, samples, weights, warnings=warnings)
                assert result is not None, "nothing asks it to stop"
                results.append(result)
                run.check_lock()
                if is_first_rank():
                    path = write_evaluation(directory, result)
                    print_estimates(result)
                    print(f"written to {path}; every sample: {samples}")
            if is_first_rank():
                print_tables(results, reference, published_name(parts.policy.shape))
    return 0
