"""Packing saved rollouts into the report: a small index, always there, and texts in compressed chunks, read on demand.

So that 20,000 responses open at once. Pure: rollouts in, strings out.
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

from nemo_disco.evaluation.run_data import Run, finite
from nemo_disco.evaluation.saved_tokens import unpack_values, unpack_widths

SNIPPET = 140  # characters of a question in the list
CHUNK = 1_500_000  # characters of text that the page unpacks at a time
TEXT_BUDGET = 100_000_000  # characters of responses in one page: about 40 MB of HTML
TOKEN_COST = 4  # characters of text that the values of one token weigh as much as
LEVELS = 99  # of a token's value on either side of 0, of the response's largest


@dataclass(frozen=True)
class Packed:
    """index: columns over groups and, flat, their responses; chunks: base64 of gzipped JSON; tokens: beside each chunk
    the values of its tokens, packed alike, "" where none were saved; note: what was cut."""

    index: dict[str, list[Any]]
    chunks: list[str]
    tokens: list[str]
    note: str | None


def pack_rollouts(runs: list[Run], budget: int = TEXT_BUDGET) -> Packed:
    """Group the responses of all runs by (run, step, question).

    Where the responses hold more than `budget` characters, the middle of the longest is cut, and `note` says so.
    """
    every = [r for run in runs for _, rollouts in run.rollouts for r in rollouts]
    lengths = [len(_text(r.get("response"))) for r in every]
    values = TOKEN_COST * sum(int(finite(r.get("length")) or 0) for r in every if "token_widths" in r)
    limit = _longest_allowed(lengths, budget * sum(lengths) // max(1, sum(lengths) + values))
    columns = (
        "run",
        "step",
        "question_id",
        "snippet",
        "chunk",
        "slot",
        "size",
        "reward",
        "correct",
        "length",
        "truncated",
    )
    index: dict[str, list[Any]] = {name: [] for name in columns}
    chunks: list[str] = []
    tokens: list[str] = []
    pending: list[list[dict[str, Any]]] = []
    held = 0

    def flush() -> None:
        chunks.append(_compress([_texts(group, limit) for group in pending]))
        values = [[_token_values(r, limit) for r in group] for group in pending]
        tokens.append(_compress(values) if any(map(any, values)) else "")
        pending.clear()

    for run, step, question_id, group in _groups(runs):
        _add_to_index(index, run, step, question_id, group, chunk=len(chunks), slot=len(pending))
        pending.append(group)
        held += sum(min(len(_text(r.get("response"))), limit) for r in group) + len(_text(group[0].get("prompt")))
        if held > CHUNK:
            flush()
            held = 0
    if pending:
        flush()
    cut = sum(length > limit for length in lengths)
    note = (
        f"{cut:,} of {len(lengths):,} responses are longer than {limit:,} characters: their middle is left out of this "
        "page and stands in rollouts/step_N.jsonl."
    )
    return Packed(index, chunks, tokens, note if cut else None)


def _groups(runs: list[Run]) -> Iterator[tuple[int, int, Any, list[dict[str, Any]]]]:
    for number, run in enumerate(runs):
        for step, rollouts in run.rollouts:
            groups: dict[str, list[dict[str, Any]]] = {}
            for rollout in rollouts:
                groups.setdefault(str(rollout.get("question_id", rollout.get("question"))), []).append(rollout)
            for group in groups.values():
                question_id = group[0].get("question_id")
                yield number, step, question_id if isinstance(question_id, int | str) else None, group


def _add_to_index(
    index: dict[str, list[Any]],
    run: int,
    step: int,
    question_id: Any,
    group: list[dict[str, Any]],
    chunk: int,
    slot: int,
) -> None:
    question = _text(group[0].get("question", group[0].get("prompt")))
    of_group = {"run": run, "step": step, "question_id": question_id, "snippet": " ".join(question[:SNIPPET].split())}
    for name, value in (of_group | {"chunk": chunk, "slot": slot, "size": len(group)}).items():
        index[name].append(value)
    for rollout in group:
        for name in ("reward", "length"):
            index[name].append(finite(rollout.get(name)))
        for name in ("correct", "truncated"):
            index[name].append(int(bool(rollout.get(name))))


def _texts(group: list[dict[str, Any]], limit: int) -> dict[str, Any]:
    first = group[0]
    return {
        "question": _text(first.get("question")),
        "prompt": _text(first.get("prompt")),
        "answer": _text(first.get("answer")),
        "responses": [_cut(_text(r.get("response")), limit) for r in group],
    }


def _text(value: Any) -> str:
    """A text as it is; alternatives (a list of answers) joined; anything else as JSON."""
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
    """Of the response as `_cut` leaves it: widths, how much of the text each token makes in JavaScript's UTF-16 units,
    and its weight and log_ratio. None where they were not saved, or do not fit the response."""
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
        first = int((ends - widths < half).sum())  # tokens that begin before the gap
        last = int((ends <= half + gap).sum())  # tokens that end in it
        head = np.diff(before[:first], prepend=0)
        tail = np.diff(after[last:], prepend=0)
        widths = np.concatenate([head, [len(_gap(gap))], tail])
        values = {n: None if v is None else np.concatenate([v[:first], [0.0], v[last:]]) for n, v in values.items()}
    return {"widths": _in_utf16(widths, _cut(text, limit))} | {
        n: _levels(v) for n, v in values.items() if v is not None
    }


def _in_utf16(widths: NDArray[np.int_], text: str) -> list[int]:
    if text and max(text) > "\uffff":
        wide = [i for i, character in enumerate(text) if character > "\uffff"]
        owner = np.searchsorted(widths.cumsum(), wide, side="right")
        widths = widths + np.bincount(owner, minlength=len(widths))
    listed: list[int] = widths.tolist()
    return listed


def _levels(values: NDArray[np.float64]) -> dict[str, Any]:
    """As whole numbers of a unit, which pack well; `all` where every token has the same."""
    top = float(np.abs(values).max(initial=0.0))
    if np.ptp(values) == 0:
        return {"all": float(f"{values[0]:.3g}")}
    return {"unit": float(f"{top / LEVELS:.3g}"), "of": np.rint(values / top * LEVELS).astype(int).tolist()}


def _longest_allowed(lengths: list[int], budget: int) -> int:
    """The largest limit under which the texts, each cut to it, fit into the budget."""
    left = budget
    ordered = sorted(lengths)
    for i, length in enumerate(ordered):
        share = left // (len(ordered) - i)
        if length > share:
            return max(share, 2)
        left -= length
    return max(ordered, default=0)


def _compress(groups: list[Any]) -> str:
    raw = json.dumps(groups, ensure_ascii=False, allow_nan=False).encode("utf-8", errors="replace")
    return base64.b64encode(gzip.compress(raw, compresslevel=6, mtime=0)).decode("ascii")
