"""Floors of the GPU benchmark: counted by hand at small sizes, in README.md's table, and as divisors of times."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

GPU = Path(__file__).parents[2] / "benchmarks" / "gpu"
sys.path.insert(0, str(GPU))

import counts  # noqa: E402 - a script's directory, not a package
import section  # noqa: E402
from counts import Rates, Work  # noqa: E402
from setting import TINY, Setting, build_policy, make_random_rollouts, model_directory  # noqa: E402

REAL, TOY = Setting(False, {}), Setting(True, {})


def test_a_floor_is_the_slower_of_arithmetic_and_memory() -> None:
    assert Work(10.0, 8.0).floor_seconds(Rates(5.0, 2.0)) == 4.0
    assert Work(30.0, 8.0).floor_seconds(Rates(5.0, 2.0)) == 6.0


def test_datasheets() -> None:
    assert {"H100": Rates(989e12, 3.35e12), "H200": Rates(989e12, 4.8e12)} == counts.DATASHEET


def test_matrix_products_are_counted_as_a_loop_over_them_counts() -> None:
    """Every matrix counts three times, for forward and backward, and causal attention counts its pairs."""
    shape, (prompts, responses) = TINY, TOY.lengths("1p5b")
    flops = 0
    for prompt, response in zip(prompts, responses, strict=True):
        n = prompt + response - 1
        for _ in range(shape.layers):
            flops += 2 * n * 64 * (64 + 2 * 32) + 2 * n * 64 * 64 + 3 * 2 * n * 64 * 128
            flops += sum(2 * 2 * 64 * keys for keys in range(1, n + 1))
        flops += 2 * response * 64 * 260
    assert counts.make_training_counter("1p5b")(TOY) == Work(3 * flops, 36 * shape.parameters)


def test_decoding_reads_weights_and_cache() -> None:
    rows, prompt, tokens = TOY.decoding_sizes()
    cache = 2 * 2 * TINY.layers * 2 * 16 * rows * (prompt + tokens / 2)
    weights = TINY.parameters - 260 * 64
    assert counts.count_decoding_step(TOY) == Work(2 * weights * rows, 2 * weights + cache)


def test_counted_lengths_are_those_that_are_run() -> None:
    for name in ("1p5b", "step", "qwen3_0p6b_65k"):
        rollouts = make_random_rollouts(260, TOY.rollout_sizes(name))
        assert (rollouts.prompt_lengths.tolist(), rollouts.response_lengths.tolist()) == TOY.lengths(name)
    assert [sum(x) for x in zip(*REAL.lengths("qwen3_0p6b_16k"), strict=True)] == [16384, 16384]


def test_the_counted_parameters_are_the_networks() -> None:
    for name in ("1p5b", "qwen3_0p6b_16k"):
        shape = TOY.shape(name)
        with model_directory(shape) as path:
            policy = build_policy(path, 64, with_optimizer=False)
        assert policy.optimizer is None
        assert sum(p.numel() for chunk in policy.network for p in chunk.parameters()) == shape.parameters


def test_every_figure_is_of_a_section_and_predicted_above_its_floor() -> None:
    for row in counts.ROWS:
        assert row.key.split(".")[0] in section.SECTIONS
        assert min(row.prediction) >= 1 and row.reason


def test_the_page_has_the_table_that_is_counted() -> None:
    text = counts.README.read_text()
    assert text == counts.render_page(text), "The table is out of date. Run: python benchmarks/gpu/counts.py --write"


@pytest.mark.parametrize(
    ("device", "expected"), [("NVIDIA H200", 2.0), ("NVIDIA H100 80GB HBM3", 1.396), ("cpu", None)]
)
def test_measured_over_floor(device: str, expected: float | None) -> None:
    setting = Setting(False, {"floors": {"matrix_flops": 800e12, "copy_bytes_per_second": 2.4e12}})
    seconds = 2 * counts.count_copy(setting).bytes / 4.8e12
    figures = counts.divide_by_floors(setting, device, {"floors": {"copy_s": seconds}, "step": {"error": "no"}})
    assert figures.keys() == {"floors.copy_s"}
    assert figures["floors.copy_s"]["times_measured_floor"] == pytest.approx(1.0)
    assert figures["floors.copy_s"].get("times_datasheet_floor") == (expected and pytest.approx(expected, rel=1e-3))
