"""Layouts on a cluster: which are legal, which fit into memory, how long a step takes, and which is recommended."""

from dataclasses import replace
from functools import cache

import pytest

from nemo_disco.commands.plan import find_workload
from nemo_disco.config.compose import compose
from nemo_disco.estimate.layouts import USABLE, assess, candidates, recommend
from nemo_disco.estimate.memory import Layout
from nemo_disco.estimate.timing import step_seconds
from nemo_disco.models.shape import NAMES_BY_SIZE, PUBLISHED

GIB = 2**30


@cache
def compose_recipe(nodes=1):
    return compose("recipe/disco_logl_7b", [f"trainer.num_nodes={nodes}"])


@cache
def recipe_workload():
    """The work of a step of the recipe, which does not depend on the number of GPUs."""
    return find_workload(compose_recipe())


def published_shape(size):
    return PUBLISHED[NAMES_BY_SIZE[size]]


def estimate_seconds(layout, gpu=80, **changes):
    """Estimated seconds of a step of the 7B model on four nodes, by part.

    gpu: memory of a GPU in GiB; changes: of the workload.
    """
    layout = replace(layout, data=32 // layout.model_ranks)
    return assess(replace(recipe_workload(), **changes), published_shape("7b"), layout, gpu * GIB, 8).seconds


@pytest.mark.parametrize("size", list(NAMES_BY_SIZE))
def test_every_layout_listed_is_legal_and_the_fitting_come_first(size):
    shape = published_shape(size)
    layouts = candidates(compose_recipe(nodes=4), recipe_workload(), shape, 80 * GIB)
    assert len(layouts) == len({c.layout for c in layouts}) > 4
    for c in layouts:
        layout = c.layout
        assert layout.model_ranks * layout.data == 32 and layout.tensor <= 8
        assert shape.kv_heads % layout.tensor == 0 and shape.layers % (layout.pipeline * layout.virtual) == 0
        assert layout.sequence_parallel == (layout.tensor > 1) and (layout.virtual == 1 or layout.pipeline > 1)
        assert c.fits == (c.memory.training <= USABLE * c.gpu_bytes and c.waves > 0)
    fits = [c.fits for c in layouts]
    assert fits == sorted(fits, reverse=True)
    steps = [c.seconds.step for c in layouts if c.fits]
    assert steps == sorted(steps)


@pytest.mark.parametrize(
    ("size", "nodes"),
    [("1.5b", 1), ("7b", 1), ("8b", 1), ("32b", 4), ("70b", 8), ("30b", 2), ("8x7b", 4), ("235b", 16)],
)
def test_each_size_has_a_layout_on_nodes_of_eight_80_gb_gpus(size, nodes):
    layouts = candidates(compose_recipe(nodes=nodes), recipe_workload(), published_shape(size), 80 * GIB)
    best = recommend(layouts)
    assert best is not None and best.fits
    assert best.seconds.step <= 1.05 * layouts[0].seconds.step
    assert not any(
        c.fits and c.layout.model_ranks < best.layout.model_ranks and c.seconds.step <= best.seconds.step
        for c in layouts
    )


def test_none_is_recommended_where_none_fits():
    assert recommend(candidates(compose_recipe(), recipe_workload(), published_shape("70b"), 80 * GIB)) is None
    assert recommend(candidates(compose_recipe(), recipe_workload(), published_shape("70b"), 400 * GIB)) is not None


def test_recomputation_is_the_least_that_fits():
    def least_recomputation(gigabytes):
        layouts = candidates(compose_recipe(), recipe_workload(), published_shape("1.5b"), gigabytes * GIB)
        return next(c.layout.recompute for c in layouts if c.layout.model_ranks == 1)

    assert least_recomputation(80) == "full" and least_recomputation(400) is None


def test_training_flops_by_hand():
    """On one GPU: 6 FLOPs per weight and token (arXiv 2001.08361, 2.1), and three times attention's 2 n q per layer.

    n is the length of a sequence, q the width of the queries.
    """
    shape, tokens = published_shape("7b"), 128 * 8 * 9216 / 3
    estimate = assess(recipe_workload(), shape, Layout(), 400 * GIB, 1).seconds
    weights = shape.parameters - shape.embedding_parameters  # the embedding is looked up
    attention = 2 * tokens * 1.6 * (9216 / 3) * 28 * 28 * 128
    expected = 6 * tokens * weights / (0.4 * 989e12) + 3 * attention / (0.25 * 989e12)
    assert estimate.train == pytest.approx(expected, rel=1e-3)
    assert estimate.log_probs == pytest.approx(expected / 3, rel=1e-3)
    assert estimate.pass1 == pytest.approx(expected / 3 * 3 / 4, rel=1e-3)  # not in the first of four mini-batches
    assert estimate.communication == 0


def test_decoding_is_bound_by_bandwidth():
    """Each decoded token reads all weights of a rank: fewer with TP, but PP saves nothing, as its stages take turns.

    Each further wave of responses reads the weights again.
    """
    alone, halves = estimate_seconds(Layout()).generate, estimate_seconds(Layout(tensor=2)).generate
    assert alone > 8192 * 2 * 7.6e9 / (0.6 * 3.35e12)
    assert alone > halves
    assert estimate_seconds(Layout(pipeline=2)).generate >= alone
    assert estimate_seconds(Layout(pipeline=2), gpu=40).generate > 1.5 * estimate_seconds(Layout(pipeline=2)).generate


@pytest.mark.parametrize(
    ("slower", "faster", "part"),
    [
        (Layout(recompute="full"), Layout(), "train"),
        (Layout(recompute="selective"), Layout(), "train"),
        (Layout(pipeline=4), Layout(pipeline=4, virtual=7), "train"),
        (Layout(pipeline=4), Layout(pipeline=2), "log_probs"),
        (Layout(tensor=4), Layout(tensor=2), "communication"),
        (Layout(context=8), Layout(context=2), "log_probs"),
    ],
)
def test_a_layout_with_more_work_takes_longer(slower, faster, part):
    assert getattr(estimate_seconds(slower), part) > getattr(estimate_seconds(faster), part)


@pytest.mark.parametrize(("expert", "link"), [(8, 0.7 * 450e9), (32, 0.7 * 50e9)])
def test_experts_exchange_tokens_while_sampling_too(expert, link):
    """By hand: a rank's share of the decoded tokens, 8 copies of each in each layer, there and back in bf16; and two
    all-to-alls of 20 us a layer for each of 8192 tokens of the longest response. Sampling is all that differs."""
    shape, layout = published_shape("30b"), Layout(data=32, expert=expert)
    decoded, latency = 32 * 9216 / 3, 8192 * 48 * 2 * 20e-6
    expected = decoded * 48 * 8 * 2 * 2048 * 2 * (expert - 1) / expert / link + latency
    work = recipe_workload()
    exchanged = step_seconds(work, shape, layout, 400 * GIB, 8).generate
    free = step_seconds(work, shape, replace(layout, expert=1), 400 * GIB, 8).generate
    read = 8192 * 2 * 48 * shape.expert_parameters * (1 - 1 / expert) / (0.6 * 3.35e12)  # fewer weights a rank
    assert exchanged - free == pytest.approx(expected - read, rel=1e-6)


def test_an_objectives_extra_passes_take_time():
    two_pass, separable = estimate_seconds(Layout()), estimate_seconds(Layout(), two_passes=False)
    assert separable.pass1 == 0 < two_pass.pass1 and separable.train == two_pass.train
    assert estimate_seconds(Layout(), reference=True).log_probs == pytest.approx(2 * two_pass.log_probs)


def test_a_layout_beyond_a_node_pays_for_the_network():
    near = estimate_seconds(Layout(context=8)).log_probs
    assert estimate_seconds(Layout(tensor=4, context=8)).log_probs > near
