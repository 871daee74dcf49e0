"""docs/support.md claims exactly what the tests and the result files show."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from tools import families, support
from tools.support import NOT_RUN, Feature

DECODE = Feature("decoding", key="decode.plain.tokens_per_second")


def result(**changes: Any) -> dict[str, Any]:
    """A result file of a GPU run with a figure for decoding; changes: of its section "about"."""
    about = {"date": "2026-12-01T10:00:00+00:00", "device": "NVIDIA H200", "tiny": False, **changes}
    return {"about": about, "decode": {"plain": {"tokens_per_second": 9e3}}}


def test_the_page_is_current() -> None:
    written = support.PAGE.read_text()
    assert written == support.render_page(support.read_results(support.RESULTS)), (
        "docs/support.md is out of date; `make support` writes it"
    )


def test_the_cards_are_current() -> None:
    assert families.PAGE.read_text() == families.render_page(), (
        "docs/families.md is out of date; `make support` writes it"
    )


def test_a_run_on_a_gpu_is_claimed_with_its_date() -> None:
    cell = support.describe_gpu_run(DECODE, [result(), result(date="2026-11-01T10:00:00+00:00")][::-1], several=False)
    assert cell == "NVIDIA H200, 2026-12-01"
    assert support.describe_gpu_run(DECODE, [result()], several=True) == NOT_RUN
    assert support.describe_gpu_run(DECODE, [result(devices=8)], several=True) == "NVIDIA H200, 2026-12-01"


@pytest.mark.parametrize(
    "results",
    [
        [],
        [result(tiny=True)],
        [result(device="cpu")],
        [result() | {"decode": {"error": "exit code 1"}}],
        [result() | {"decode": {"plain": {"tokens_per_second": None}}}],
        [result() | {"decode": {"in_place": {"tokens_per_second": 9e3}}}],
    ],
    ids=["no file", "toy sizes", "a CPU", "a section that failed", "no figure", "another figure"],
)
def test_nothing_else_counts_as_a_run(results: list[dict[str, Any]]) -> None:
    assert support.describe_gpu_run(DECODE, results, several=False) == NOT_RUN


def test_a_figure_out_of_its_bound_is_no_claim() -> None:
    feature = Feature("layers", key="correctness.bf16_gradient")
    for within in (True, False):
        section = {"bf16_gradient": 0.01, "within_bounds": {"bf16_gradient": within}}
        cell = support.describe_gpu_run(feature, [result() | {"correctness": section}], several=False)
        assert (cell == NOT_RUN) != within


def test_a_test_is_claimed_with_the_command_that_runs_it() -> None:
    assert support.find_commands("test_support.py") == {"make test"}
    assert support.find_commands("triton_kernels/test_compiles.py") == {"make test-triton"}
    assert "make test-slow" in support.find_commands("benchmarks/test_gpu_benchmark.py::test_every_section_runs")
    assert support.describe_tests(DECODE) == NOT_RUN


@pytest.mark.parametrize("test", ["policy/test_missing.py", "test_support.py::test_missing"])
def test_a_test_that_is_not_there_cannot_be_named(test: str) -> None:
    with pytest.raises(ValueError, match="there is no such test"):
        support.find_commands(test)
