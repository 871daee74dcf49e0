"""`nemo-disco plan`: what a run will do and need, from its configuration alone. Nothing is built or sampled.

Prints two tables: the batch vocabulary with this run's numbers, and the memory of a rank by part.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from nemo_disco.config.checks import check_shape
from nemo_disco.config.memory import Memory, estimate
from nemo_disco.config.schema import RunConfig
from nemo_disco.config.shape import KNOWN, ModelShape, read_shape


def print_plan(config: RunConfig, world_size: int, console: Console | None = None) -> None:
    """Raises UserError if the model directory is there and damaged, or does not fit the layout."""
    console = console or Console()
    console.print(_vocabulary_table(config, world_size))
    shape, note = find_shape(config.model.path)
    if shape is None:
        console.print(note, soft_wrap=True)
        return
    check_shape(config, shape)
    console.print(_memory_table(config, shape, estimate(config, shape, world_size)))
    console.print(note, soft_wrap=True)


def find_shape(path: str) -> tuple[ModelShape | None, str]:
    """The shape of the model at `path`, or the published one of a known name, and a line that says which it is."""
    if Path(path).exists():
        return read_shape(path), f"Model: {path}."
    if (known := KNOWN.get(Path(path).name)) is not None:
        return known, f"Model: not found at {path}; this is the published shape of {Path(path).name}."
    return None, f"Model: not found at {path}, so there is no estimate of memory."


def vocabulary(config: RunConfig, world_size: int) -> list[tuple[str, str]]:
    """The batch's terms and this run's numbers for them, largest first; tokens are at most so many."""
    model, group = config.model, config.generation.responses_per_question
    questions, mini = config.data.questions_per_step, config.algorithm.mini_batch_questions
    ranks = world_size // (
        model.tensor_model_parallel_size * model.pipeline_model_parallel_size * model.context_parallel_size
    )
    prompt, response = config.data.max_prompt_length, config.generation.longest_response
    longest = prompt + response
    a_micro_batch = model.token_budget // longest
    micro_batches = -(-mini * group // (ranks * a_micro_batch))
    steps = config.trainer.max_steps
    layout = {
        "TP": model.tensor_model_parallel_size,
        "PP": model.pipeline_model_parallel_size,
        "CP": model.context_parallel_size,
        "DP": ranks,
    }
    return [
        ("steps", f"{steps:,}"),
        ("processes", f"{world_size:,} = " + " x ".join(f"{name} {size}" for name, size in layout.items())),
        ("questions a step", f"{questions:,}"),
        ("responses a step", f"{questions * group:,} = {questions:,} questions x {group} responses"),
        ("mini-batches a step", f"{questions // mini:,} of {mini} questions, {mini * group:,} responses each"),
        ("optimizer steps in the run", f"{steps * (questions // mini):,}"),
        ("tokens a response", f"<= {longest:,} = {prompt:,} prompt + {response:,} response"),
        ("tokens a step", f"<= {questions * group * longest:,}"),
        ("tokens a rank a step", f"<= {-(-questions * group // ranks) * longest:,}"),
        ("token budget of a micro-batch", f"{model.token_budget:,}: {a_micro_batch:,} full-length responses"),
        ("micro-batches a mini-batch a rank", f"<= {micro_batches:,}"),
    ]  # fmt: skip


def _vocabulary_table(config: RunConfig, world_size: int) -> Table:
    table = Table(
        "batch", "", title=f"{config.algorithm.name}, {config.generation.engine} engine", title_justify="left"
    )
    for name, number in vocabulary(config, world_size):
        table.add_row(name, number)
    return table


def _memory_table(config: RunConfig, shape: ModelShape, memory: Memory) -> Table:
    table = Table("memory a rank (estimate)", "GiB", title=f"{shape.parameters:,} parameters", title_justify="left")
    table.columns[1].justify = "right"
    recomputed = config.model.activations_checkpoint_granularity
    rows = [
        (f"weights ({config.trainer.precision})", memory.weights),
        ("gradients", memory.gradients),
        ("optimizer state", memory.optimizer),
        ("activations" + (f" ({recomputed} recomputation)" if recomputed else ""), memory.activations),
        ("log-prob buffers", memory.log_probs),
        ("training, in all", memory.training),
        ("KV cache, all responses of a rank at full length (sampled in rounds if it does not fit)", memory.kv_cache),
    ]
    for name, size in rows:
        table.add_row(name, _gib(size), end_section=size in (memory.log_probs, memory.training))
    return table


def _gib(size: int) -> str:
    gib = size / 2**30
    return f"{gib:,.1f}" if gib >= 10 else f"{gib:.3f}"
