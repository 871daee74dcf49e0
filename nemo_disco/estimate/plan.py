"""`nemo-disco plan`: sizes, memory and time of a run, from its configuration alone. Nothing is built or sampled.

Prints the batch sizes, a rank's memory by part, and the layouts that this cluster allows, one recommended.
"""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from nemo_disco.config.schema import RunConfig
from nemo_disco.estimate.layouts import CACHE, USABLE, Candidate, assess, candidates, check_shape, recommend
from nemo_disco.estimate.memory import Layout, Memory, Workload, host_memory
from nemo_disco.estimate.timing import ASSUMED, MEAN_LENGTH, expert_exchange
from nemo_disco.estimate.trust_region import advise, check_likely_tokens
from nemo_disco.models.shape import ModelShape, find_shape
from nemo_disco.models.unbuilt import find_unbuilt
from nemo_disco.runtime.host import total_memory

SHOWN, WIDTH = 8, 140  # layouts, columns
_MOST_NODES = 128
_GIB = 2**30


def print_plan(config: RunConfig, world_size: int, work: Workload, console: Console | None = None) -> None:
    """Print the plan of a run. work: that of one of its steps. Imports torch.

    Raises UserError for a damaged model directory, for a model that has no estimate here, and for one that does not fit
    the layout or has fewer tokens than the constraint compares.
    """
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=WIDTH)  # a file has no width, and no cell may be cut
    layout = Layout.from_config(config.model, world_size)
    if (unbuilt := find_unbuilt(config.model.path)) is not None:
        console.print(unbuilt[1], soft_wrap=True, highlight=False)
    console.print(_batch_table(config, work, layout))
    if work.delta is not None:
        tokens = work.mini_batch_questions * work.group * work.response_limit
        console.print(advise(work.estimator, work.delta, tokens), soft_wrap=True, highlight=False)
    shape, note = unbuilt or find_shape(config.model.path)
    if shape is not None:
        check_shape(config, shape)
        check_likely_tokens(work.likely_tokens, shape.vocab)
        gigabytes, source = _gpu_memory(config)
        configured = assess(work, shape, layout, gigabytes * _GIB, config.trainer.devices)
        layouts = candidates(config, work, shape, gigabytes * _GIB)
        best = recommend(layouts)
        console.print(_memory_table(config, shape, configured.memory))
        console.print(_layout_table(layouts, configured, best, gigabytes))
        for line in (
            _advice(config, work, shape, layouts, configured, best),
            *_expert_lines(work, shape, layout),
            f"Memory: GPUs of {gigabytes:g} GB ({source}), of which {USABLE:.0%} is assumed usable; keys and values "
            f"get {CACHE:.0%} of what weights and optimizer state leave (model.optim.offload moves the latter away).",
            _host_line(config, configured.memory),
            f"Time: estimated, not measured. Assumed: {ASSUMED}.",
        ):
            console.print(line, soft_wrap=True, highlight=False)
    if unbuilt is None:
        console.print(note, soft_wrap=True)


def _expert_lines(work: Workload, shape: ModelShape, layout: Layout) -> list[str]:
    """A line on what the experts of the configured layout exchange, if there are any and ranks share them."""
    tokens = MEAN_LENGTH * work.questions * work.group * work.full_length
    sent = expert_exchange(work, shape, layout, tokens) / _GIB
    ranks = f"EP {layout.expert} x ETP {layout.expert_tensor}, as configured"
    line = (
        f"Experts: {ranks}: a rank sends {sent:.1f} GiB to others in each pass over a step's tokens, on average. "
        "Memory and time are of experts that all get equally many tokens."
    )
    return [line] if sent else []


def _host_line(config: RunConfig, memory: Memory) -> str:
    """A line on the host memory needed with GPUs and without, and this host's."""
    devices, offload = config.trainer.devices, config.model.optim.offload
    beside, alone = (host_memory(memory, offload=offload, cuda=cuda) / _GIB for cuda in (True, False))
    available = total_memory() / _GIB
    line = (
        f"Host memory: {beside:.1f} GiB per process beside a GPU (libraries, and a checkpoint's copy of the "
        f"optimizer's state), {alone:.1f} GiB without one (training too); {devices} processes on a host take "
        f"{devices * beside:.0f} or {devices * alone:.0f} GiB, and this host has {available:.0f}."
    )
    short = " Where that is too little, checkpoints are not copied: training waits until they are written."
    return line + (short if devices * beside > available else "")


def _gpu_memory(config: RunConfig) -> tuple[float, str]:
    """GB of a GPU, and the source of the figure."""
    import torch

    if config.plan.gpu_memory_gb is not None:
        return config.plan.gpu_memory_gb, "plan.gpu_memory_gb"
    if torch.cuda.is_available():
        return round(torch.cuda.get_device_properties(0).total_memory / _GIB, 1), torch.cuda.get_device_name(0)
    return 80, "there is none here; plan.gpu_memory_gb=... changes it"


def batch_sizes(work: Workload, layout: Layout, steps: int) -> list[tuple[str, str]]:
    """(name, this run's number as text) of the sizes from a run to a micro-batch; numbers of tokens are limits."""
    questions, mini, group, longest = work.questions, work.mini_batch_questions, work.group, work.full_length
    ranks, per_micro_batch = layout.data, work.token_budget // longest
    micro_batches = -(-mini * group // (ranks * per_micro_batch))
    sizes = {"TP": layout.tensor, "PP": layout.pipeline, "CP": layout.context, "DP": ranks}
    return [
        ("steps", f"{steps:,}"),
        ("processes", f"{layout.ranks:,} = " + " x ".join(f"{name} {size}" for name, size in sizes.items())),
        ("questions per step", f"{questions:,}"),
        ("responses per step", f"{questions * group:,} = {questions:,} questions x {group} responses"),
        ("mini-batches per step", f"{questions // mini:,} of {mini} questions, {mini * group:,} responses each"),
        ("optimizer steps in the run", f"{steps * (questions // mini):,}"),
        ("tokens per response", f"<= {longest:,} = {work.prompt_limit:,} prompt + {work.response_limit:,} response"),
        ("tokens per step", f"<= {questions * group * longest:,}"),
        ("tokens per rank and step", f"<= {-(-questions * group // ranks) * longest:,}"),
        ("token budget of a micro-batch", f"{work.token_budget:,}: {per_micro_batch:,} full-length responses"),
        ("micro-batches per mini-batch and rank", f"<= {micro_batches:,}"),
    ]


def _batch_table(config: RunConfig, work: Workload, layout: Layout) -> Table:
    title = f"{config.algorithm.name}, {config.generation.engine} engine"
    table = Table("batch", "", title=title, title_justify="left")
    for name, size in batch_sizes(work, layout, config.trainer.max_steps):
        table.add_row(name, size)
    return table


def _memory_table(config: RunConfig, shape: ModelShape, memory: Memory) -> Table:
    active = f", {shape.active_parameters:,} active" if shape.experts else ""
    title = f"{shape.parameters:,} parameters{active}"
    table = Table("memory per rank (estimate)", "GiB", title=title, title_justify="left")
    table.columns[1].justify = "right"
    recomputed = config.model.activations_checkpoint_granularity
    for name, size, ends in (
        (f"weights ({config.trainer.precision})", memory.weights, False),
        ("gradients", memory.gradients, False),
        ("optimizer state, its share", memory.optimizer, False),
        ("reference policy", memory.reference, False),
        ("activations" + (f" ({recomputed} recomputation)" if recomputed else ""), memory.activations, False),
        ("log-prob buffers", memory.log_probs, False),
        ("or, later, the layer that runs backward", memory.layer, True),
        ("training, at its peak", memory.training, True),
        ("KV cache, all responses of a rank at full length", memory.kv_cache, False),
    ):
        if size or name != "reference policy":
            table.add_row(name, _gib(size), end_section=ends)
    return table


def _layout_table(layouts: list[Candidate], configured: Candidate, best: Candidate | None, gigabytes: float) -> Table:
    """The fastest layouts, with the recommended and the configured one."""
    layout = configured.layout
    title = f"layouts on {layout.ranks} GPUs of {gigabytes:g} GB; seconds per step, estimated"
    table = Table(title=title, title_justify="left", padding=(0, 1, 0, 0))
    for name in ("TP", "PP", "VPP", "CP", "DP", "EP"):
        table.add_column(name, justify="right")
    table.add_column("recompute")
    for name in ("GiB", "waves", "generate", "old lp", "pass 1", "train", "refit", "step", "comm."):
        table.add_column(name, justify="right")
    table.add_column("")
    rows = [c for c in layouts if c.fits or best is None][:SHOWN]
    rows += [c for c in (best,) if c is not None and c not in rows]
    rows += [configured] if configured not in rows else []
    for c in rows:
        notes = [note for note, applies in (("configured", c == configured), ("recommended", c == best)) if applies]
        table.add_row(*_cells(c), ", ".join([*notes, *([] if c.fits else ["does not fit"])]))
    return table


def _cells(c: Candidate) -> list[str]:
    layout, t = c.layout, c.seconds
    virtual, expert = (size if size > 1 else "" for size in (layout.virtual, layout.expert))
    sizes = (layout.tensor, layout.pipeline, virtual, layout.context, layout.data, expert)
    waves = str(c.waves) if c.waves else "none"
    cells = [*map(str, sizes), layout.recompute or "none", f"{c.memory.training / _GIB:.1f}", waves]
    if c.waves:
        cells += [f"{s:.1f}" for s in (t.generate, t.log_probs, t.pass1, t.train, t.refit, t.step)]
        return [*cells, f"{t.communication / t.step:.0%}"]
    return [*cells, *[""] * 7]


def _advice(
    config: RunConfig,
    work: Workload,
    shape: ModelShape,
    layouts: list[Candidate],
    configured: Candidate,
    best: Candidate | None,
) -> str:
    """A line with the recommended layout's keys and the reason for it, or with a number of nodes on which one fits."""
    gpu = configured.gpu_bytes
    if best is None:
        least = min(layouts, key=lambda c: c.memory.training)
        need = f"{_name(least.layout)} needs least: {least.memory.training / _GIB:.1f} GiB of {USABLE * gpu / _GIB:.1f}"
        nodes = config.trainer.num_nodes
        while (nodes := 2 * nodes) <= _MOST_NODES:
            more = config.model_copy(update={"trainer": config.trainer.model_copy(update={"num_nodes": nodes})})
            if (fits := recommend(candidates(more, work, shape, gpu))) is not None:
                return (
                    f"No layout fits: {need}. Would work: trainer.num_nodes={nodes} with {_keys(fits.layout, shape)}."
                )
        return f"No layout fits: {need}. Would work: GPUs with more memory, shorter responses or a lower token budget."
    if best == configured:
        return f"Recommended: the configured layout. {_explain(layouts, best)}"
    return f"Recommended: {_keys(best.layout, shape)}. {_explain(layouts, best)}"


def _explain(layouts: list[Candidate], best: Candidate) -> str:
    fastest = layouts[0]
    speed = "It is the fastest that fits"
    if fastest != best:
        speed = f"It is within 5% of the fastest, {_name(fastest.layout)}, and cuts the model less"
    less_cut = [c for c in layouts if c.layout.model_ranks < best.layout.model_ranks]
    if not less_cut:
        return f"{speed}."
    if (rival := min(less_cut, key=lambda c: (not c.fits, c.seconds.step if c.fits else c.memory.training))).fits:
        return f"{speed}; {_name(rival.layout)}, which cuts the model less, takes {rival.seconds.step:.0f} s per step."
    need = f"{rival.memory.training / _GIB:.1f} GiB" if rival.waves else "more memory than a GPU has while it samples"
    return f"{speed}; no layout that cuts the model less fits: {_name(rival.layout)} would need {need}."


def _name(layout: Layout) -> str:
    virtual = f" (VPP {layout.virtual})" if layout.virtual > 1 else ""
    experts = f", EP {layout.expert}" if layout.expert > 1 else ""
    return f"TP {layout.tensor} x PP {layout.pipeline}{virtual} x CP {layout.context} x DP {layout.data}{experts}"


def _keys(layout: Layout, shape: ModelShape) -> str:
    """The command-line overrides that choose a layout."""
    virtual = layout.virtual if layout.virtual > 1 else "null"
    values = {
        "tensor_model_parallel_size": layout.tensor,
        "sequence_parallel": str(layout.sequence_parallel).lower(),
        "pipeline_model_parallel_size": layout.pipeline,
        "virtual_pipeline_model_parallel_size": virtual,
        "context_parallel_size": layout.context,
        "activations_checkpoint_granularity": layout.recompute or "null",
    }
    if shape.experts:
        values["expert_model_parallel_size"] = layout.expert
        values["expert_tensor_parallel_size"] = layout.expert_tensor
    return " ".join(f"model.{key}={value}" for key, value in values.items())


def _gib(size: int) -> str:
    gib = size / _GIB
    return f"{gib:,.1f}" if gib >= 10 else f"{gib:.3f}"
