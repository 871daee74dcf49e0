"""Layouts of a cluster: the legal and the fitting ones, a step's seconds, and the recommendation."""

from dataclasses import replace
from functools import cache

import pytest

from nemo_disco.config.compose import compose
from nemo_disco.estimate.layouts import USABLE, assess, candidates, recommend
from nemo_disco.estimate.memory import Layout
from nemo_disco.estimate.timing import Needs
from nemo_disco.models.shape import NAMES_BY_SIZE, PUBLISHED

GIB = 2**30
DISCO = Needs()


@cache
def recipe(nodes=1):
    return compose("recipe/disco_logl_7b", [f"trainer.num_nodes={nodes}"])


def known_shape(size):
    return PUBLISHED[NAMES_BY_SIZE[size]]


def seconds(layout, needs=DISCO, gpu=80):
    """Seconds of a step of the 7B model on four nodes."""
    layout = replace(layout, data=32 // layout.model_ranks)
    return assess(recipe(nodes=4), known_shape("7b"), layout, needs, gpu * GIB, 8).seconds


@pytest.mark.parametrize("size", list(NAMES_BY_SIZE))
def test_every_layout_listed_is_legal_and_the_fitting_come_first(size):
    shape = known_shape(size)
    layouts = candidates(recipe(nodes=4), shape, DISCO, 80 * GIB)
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


@pytest.mark.parametrize(("size", "nodes"), [("1.5b", 1), ("7b", 1), ("8b", 1), ("32b", 4), ("70b", 8)])
def test_each_size_has_a_layout_on_nodes_of_eight_80_gb_gpus(size, nodes):
    layouts = candidates(recipe(nodes=nodes), known_shape(size), DISCO, 80 * GIB)
    best = recommend(layouts)
    assert best is not None and best.fits
    assert best.seconds.step <= 1.05 * layouts[0].seconds.step
    assert not any(
        c.fits and c.layout.model_ranks < best.layout.model_ranks and c.seconds.step <= best.seconds.step
        for c in layouts
    )


def test_none_is_recommended_where_none_fits():
    assert recommend(candidates(recipe(), known_shape("70b"), DISCO, 80 * GIB)) is None
    assert recommend(candidates(recipe(), known_shape("70b"), DISCO, 400 * GIB)) is not None


def test_recomputation_is_the_least_that_fits():
    def recomputed(gigabytes):
        layouts = candidates(recipe(), known_shape("1.5b"), DISCO, gigabytes * GIB)
        return next(c.layout.recompute for c in layouts if c.layout.model_ranks == 1)

    assert recomputed(80) == "full" and recomputed(400) is None


def test_training_flops_by_hand():
    """One GPU: 6 FLOPs per weight and token (arXiv 2001.08361, 2.1), and three times attention's 2 n q per layer."""
    layout, config = Layout(data=1), compose("recipe/disco_logl_7b", ["trainer.devices=1"])
    shape, tokens = known_shape("7b"), 128 * 8 * 9216 / 3
    estimate = assess(config, shape, layout, DISCO, 400 * GIB, 1).seconds
    weights = shape.parameters - shape.embedding_parameters  # the embedding is looked up
    attention = 2 * tokens * 1.6 * (9216 / 3) * 28 * 28 * 128
    expected = 6 * tokens * weights / (0.4 * 989e12) + 3 * attention / (0.25 * 989e12)
    assert estimate.train == pytest.approx(expected, rel=1e-3)
    assert estimate.log_probs == pytest.approx(expected / 3, rel=1e-3)
    assert estimate.pass1 == pytest.approx(expected / 3 * 3 / 4, rel=1e-3)  # not in the first of four mini-batches
    assert estimate.communication == 0


def test_decoding_is_bound_by_bandwidth():
    """Each token reads all weights: fewer with TP, not with PP, whose stages take turns; each wave reads them again."""
    alone, halves = seconds(Layout()).generate, seconds(Layout(tensor=2)).generate
    assert alone > 8192 * 2 * 7.6e9 / (0.6 * 3.35e12)
    assert alone > halves
    assert seconds(Layout(pipeline=2)).generate >= alone
    assert seconds(Layout(pipeline=2), gpu=40).generate > 1.5 * seconds(Layout(pipeline=2)).generate


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
    assert getattr(seconds(slower), part) > getattr(seconds(faster), part)


def test_an_objectives_extra_passes_take_time():
    whole, separable = seconds(Layout()), seconds(Layout(), needs=Needs(two_passes=False))
    assert separable.pass1 == 0 < whole.pass1 and separable.train == whole.train
    assert seconds(Layout(), needs=Needs(reference=True)).log_probs == pytest.approx(2 * whole.log_probs)


def test_a_layout_beyond_a_node_pays_for_the_network():
    near = seconds(Layout(context=8)).log_probs
    assert seconds(Layout(tensor=4, context=8)).log_probs > near
