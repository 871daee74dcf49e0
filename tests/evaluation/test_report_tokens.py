"""The page's token values are those of the rollout files, widths in UTF-16 units, also in cut responses."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_disco.evaluation.rollout_pack import LEVELS, PackedRollouts, pack_rollouts
from nemo_disco.evaluation.run_data import read_runs
from nemo_disco.evaluation.saved_tokens import pack_values, pack_widths

MakeRun = Callable[..., Path]


def unpack(chunk: str) -> Any:
    return json.loads(gzip.decompress(base64.b64decode(chunk)))


def pack_one(run: Path, **changes: Any) -> tuple[PackedRollouts, str, dict[str, Any] | None]:
    """Reduce a run to one response, some of whose fields are changed, and pack its rollouts.

    Returns the packed rollouts, and the response's text and token values in them.
    """
    path = run / "rollouts" / "step_1.jsonl"
    row = json.loads(path.read_text().splitlines()[0]) | changes
    path.write_text(json.dumps(row) + "\n")
    packed = pack_rollouts(read_runs([run]), budget=400)
    tokens = unpack(packed.tokens[0])[0][0] if packed.tokens[0] else None
    return packed, unpack(packed.chunks[0])[0]["responses"][0], tokens


def test_token_values_match_their_texts(make_run: MakeRun) -> None:
    packed = pack_rollouts(read_runs([make_run(steps=2, tokens=True)]))
    (texts,), (groups,) = map(unpack, packed.chunks), map(unpack, packed.tokens)
    assert len(groups) == 6
    for group, text in zip(groups, texts, strict=True):
        for sample, (tokens, response) in enumerate(zip(group, text["responses"], strict=True)):
            assert sum(tokens["widths"]) == len(response) and tokens["widths"][-1] == 0
            assert tokens["weight"] == {"all": -0.5 if sample % 2 else 1.5}
            ratios = np.array(tokens["log_ratio"]["levels"]) * tokens["log_ratio"]["unit"]
            np.testing.assert_allclose(ratios, np.linspace(0.4, -0.4, len(ratios)), atol=0.4 / LEVELS + 1e-3)


def test_a_run_without_saved_token_values_has_none(make_run: MakeRun) -> None:
    assert pack_rollouts(read_runs([make_run(steps=2)])).tokens == [""]


def test_a_cut_response_keeps_the_values_of_its_remaining_tokens(make_run: MakeRun) -> None:
    widths = [3] * 1000 + [0]
    values = np.arange(1.0, 1002.0)
    fields = {"token_widths": pack_widths(widths), "log_ratio": pack_values(values), "length": 1001}
    packed, text, tokens = pack_one(make_run(steps=1), response="abc" * 1000, **fields)
    assert tokens is not None and packed.note is not None and len(text) < 400
    gap = text.index("\n\n[..."), text.index("...]\n\n") + len("...]\n\n")
    ends = np.cumsum(tokens["widths"])
    middle = int(np.searchsorted(ends, gap[1]))
    assert ends[middle] == gap[1] and ends[middle - 1] == gap[0] and ends[-1] == len(text)
    remaining = np.array(tokens["log_ratio"]["levels"]) * tokens["log_ratio"]["unit"]
    assert remaining[middle] == 0
    after = len(remaining) - middle - 1
    expected = np.concatenate([values[:middle], [0], values[-after:]])
    np.testing.assert_allclose(remaining, expected, atol=1001 / LEVELS)


def test_widths_are_in_utf_16_code_units(make_run: MakeRun) -> None:
    fields = {"token_widths": pack_widths([1, 1, 0, 2]), "log_ratio": pack_values([1.0, 2.0, 3.0, 4.0])}
    _, text, tokens = pack_one(make_run(steps=1), response="a\U0001f642b\U0001f642", **fields)
    assert tokens is not None and tokens["widths"] == [1, 2, 0, 3]
    assert len(text.encode("utf-16-le")) == 2 * sum(tokens["widths"])


@pytest.mark.parametrize(
    "odd",
    [{"token_widths": "?"}, {"token_widths": pack_widths([2, 2])}, {"token_widths": None}, {"token_widths": 4}],
    ids=str,
)
def test_widths_that_do_not_match_the_response_are_left_out(make_run: MakeRun, odd: dict[str, Any]) -> None:
    assert pack_one(make_run(steps=1), response="abc", log_ratio=0.5, **odd)[2] is None


def test_values_that_do_not_match_the_widths_are_left_out(make_run: MakeRun) -> None:
    fields = {"token_widths": pack_widths([1, 2]), "log_ratio": pack_values([1.0, 2.0, 3.0]), "weight": 0.5}
    assert pack_one(make_run(steps=1), response="abc", **fields)[2] == {"widths": [1, 2], "weight": {"all": 0.5}}
