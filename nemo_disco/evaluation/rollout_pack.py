"""Packing of saved rollouts for the report: a small index, and texts in compressed chunks that the page unpacks on
demand, so that a page with 20,000 responses opens at once. Pure: rollouts in, strings out.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_disco.evaluation.run_data import Run, to_finite
from nemo_disco.evaluation.saved_tokens import unpack_values, unpack_widths

SNIPPET = 140  # characters of a question in the list
CHUNK = 1_500_000  # characters of text that the page unpacks at a time
TEXT_BUDGET = 100_000_000  # characters of responses and token values in one page: about 40 MB of HTML
TOKEN_COST = 4  # characters of text that take as much space as the values of one token
COLUMNS = (
    *("run", "step", "question_id", "snippet", "chunk", "slot", "size"),  # of groups
    *("reward", "correct", "length", "truncated"),  # of responses
)
LEVELS = 99  # quantization levels of token values on each side of 0


@dataclass(frozen=True)
class PackedRollouts:
    """index: columns with an entry for each group, or for each response of all groups; chunks: texts of groups as
    base64 of gzipped JSON; tokens: for each chunk its token values in the same form, "" if none were saved; note: a
    message on responses that were cut, or None."""

    index: dict[str, list[Any]]
    chunks: list[str]
    tokens: list[str]
    note: str | None


def pack_rollouts(runs: list[Run], budget: int = TEXT_BUDGET) -> PackedRollouts:
    """Pack the responses of all runs, in groups of one (run, step, question).

    If they take more than `budget` characters in all, token values included (TOKEN_COST), the longest ones are cut in
    their middle.
    """
    all_rollouts = [r for run in runs for _, rollouts in run.rollouts for r in rollouts]
    lengths = [len(_text(r.get("response"))) for r in all_rollouts]
    values_cost = TOKEN_COST * sum(int(to_finite(r.get("length")) or 0) for r in all_rollouts if "token_widths" in r)
    limit = _length_limit(lengths, budget * sum(lengths) // max(1, sum(lengths) + values_cost))
    index: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    chunks: list[str] = []
    tokens: list[str] = []
    pending: list[list[dict[str, Any]]] = []
    characters = 0

    def flush() -> None:
        chunks.append(_compress([_texts(group, limit) for group in pending]))
        values = [[_token_values(r, limit) for r in group] for group in pending]
        tokens.append(_compress(values) if any(map(any, values)) else "")
        pending.clear()

    for run, step, question_id, group in _groups(runs):
        question = _text(group[0].get("question", group[0].get("prompt")))
        row = {"run": run, "step": step, "question_id": question_id, "snippet": " ".join(question[:SNIPPET].split())}
        for name, value in (row | {"chunk": len(chunks), "slot": len(pending), "size": len(group)}).items():
            index[name].append(value)
        for rollout in group:
            for name in ("reward", "length"):
                index[name].append(to_finite(rollout.get(name)))
            for name in ("correct", "truncated"):
                index[name].append(int(bool(rollout.get(name))))
        pending.append(group)
        characters += sum(min(len(_text(r.get("response"))), limit) for r in group) + len(_text(group[0].get("prompt")))
        if characters > CHUNK:
            flush()
            characters = 0
    if pending:
        flush()
    cut = sum(length > limit for length in lengths)
    note = (
        f"{cut:,} of {len(lengths):,} responses are longer than {limit:,} characters: this page leaves out their "
        "middle; the whole text is in rollouts/step_N.jsonl."
    )
    return PackedRollouts(index, chunks, tokens, note if cut else None)


def _groups(runs: list[Run]) -> Iterator[tuple[int, int, Any, list[dict[str, Any]]]]:
    """Run number, step, question id (None if it is not a plain value) and rollouts of each group."""
    for number, run in enumerate(runs):
        for step, rollouts in run.rollouts:
            groups: dict[str, list[dict[str, Any]]] = {}
            for rollout in rollouts:
                groups.setdefault(str(rollout.get("question_id", rollout.get("question"))), []).append(rollout)
            for group in groups.values():
                question_id = group[0].get("question_id")
                yield number, step, question_id if isinstance(question_id, int | str) else None, group


def _texts(group: list[dict[str, Any]], limit: int) -> dict[str, Any]:
    first = group[0]
    return {
        "question": _text(first.get("question")),
        "prompt": _text(first.get("prompt")),
        "answer": _text(first.get("answer")),
        "responses": [_cut(_text(r.get("response")), limit) for r in group],
    }


def _text(value: Any) -> str:
    """The value as text: alternatives (a list of answers) joined, anything but text as JSON."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, list):
        return "  or  ".join(map(_text, value))
    return json.dumps(value)


def _cut(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}{_gap(len(text) - 2 * half)}{text[-half:]}"


def _gap(characters: int) -> str:
    return f"\n\n[... {characters:,} characters left out of this page ...]\n\n"


def _token_values(rollout: dict[str, Any], limit: int) -> dict[str, Any] | None:
    """Values of the tokens of a response that `_cut` may shorten: widths, the UTF-16 code units (JavaScript's lengths)
    of text that each token adds, weight and log_ratio. None if they were not saved or do not match the response."""
    saved, text = unpack_widths(rollout.get("token_widths")), _text(rollout.get("response"))
    if not saved or sum(saved) != len(text):
        return None
    widths = np.array(saved)
    names = [name for name in ("weight", "log_ratio") if name in rollout]
    values = {name: unpack_values(rollout[name], len(widths)) for name in names}
    if len(text) > limit:
        half, gap = limit // 2, len(text) - 2 * (limit // 2)
        ends = widths.cumsum()
        before, after = np.minimum(ends, half), np.maximum(ends - half - gap, 0)
        first = int((ends - widths < half).sum())  # number of tokens that begin before the gap
        last = int((ends <= half + gap).sum())  # number of tokens that end before the text after it
        head = np.diff(before[:first], prepend=0)
        tail = np.diff(after[last:], prepend=0)
        widths = np.concatenate([head, [len(_gap(gap))], tail])
        values = {n: None if v is None else np.concatenate([v[:first], [0.0], v[last:]]) for n, v in values.items()}
    quantized = {name: _quantize(v) for name, v in values.items() if v is not None}
    return {"widths": _utf16_widths(widths, _cut(text, limit))} | quantized


def _utf16_widths(widths: NDArray[np.int_], text: str) -> list[int]:
    """Widths in UTF-16 code units, from widths in characters: a character above U+FFFF has two units."""
    if text and max(text) > "\uffff":
        wide = [i for i, character in enumerate(text) if character > "\uffff"]
        token = np.searchsorted(widths.cumsum(), wide, side="right")
        widths = widths + np.bincount(token, minlength=len(widths))
    units: list[int] = widths.tolist()
    return units


def _quantize(values: NDArray[np.float64]) -> dict[str, Any]:
    """Values as integer `levels` of a `unit`, which compress well; `all`, a single value, if all are equal."""
    top = float(np.abs(values).max(initial=0.0))
    if np.ptp(values) == 0:
        return {"all": float(f"{values[0]:.3g}")}
    return {"unit": float(f"{top / LEVELS:.3g}"), "levels": np.rint(values / top * LEVELS).astype(int).tolist()}


def _length_limit(lengths: list[int], budget: int) -> int:
    """The largest limit with which the texts, each cut to it, fit into the budget."""
    remaining = budget
    ordered = sorted(lengths)
    for i, length in enumerate(ordered):
        share = remaining // (len(ordered) - i)
        if length > share:
            return max(share, 2)
        remaining -= length
    return max(ordered, default=0)


def _compress(groups: list[Any]) -> str:
    raw = json.dumps(groups, ensure_ascii=False, allow_nan=False).encode("utf-8", errors="replace")
    return base64.b64encode(gzip.compress(raw, compresslevel=6, mtime=0)).decode("ascii")
