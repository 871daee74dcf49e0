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

from nemo_disco.evaluation.run_data import Run, finite

SNIPPET = 140  # characters of a question in the list
CHUNK = 1_500_000  # characters of text that the page unpacks at a time
TEXT_BUDGET = 100_000_000  # characters of responses in one page: about 40 MB of HTML


@dataclass(frozen=True)
class Packed:
    """index: columns over groups and, flat, their responses; chunks: base64 of gzipped JSON; note: what was cut."""

    index: dict[str, list[Any]]
    chunks: list[str]
    note: str | None


def pack_rollouts(runs: list[Run], budget: int = TEXT_BUDGET) -> Packed:
    """Group the responses of all runs by (run, step, question).

    Where the responses hold more than `budget` characters, the middle of the longest is cut, and `note` says so.
    """
    lengths = [len(_text(r.get("response"))) for run in runs for _, rollouts in run.rollouts for r in rollouts]
    limit = _longest_allowed(lengths, budget)
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
    pending: list[dict[str, Any]] = []
    held = 0
    for run, step, question_id, group in _groups(runs):
        _add_to_index(index, run, step, question_id, group, chunk=len(chunks), slot=len(pending))
        texts = _texts(group, limit)
        pending.append(texts)
        held += sum(map(len, texts["responses"])) + len(texts["prompt"])
        if held > CHUNK:
            chunks.append(_compress(pending))
            pending, held = [], 0
    if pending:
        chunks.append(_compress(pending))
    cut = sum(length > limit for length in lengths)
    note = (
        f"{cut:,} of {len(lengths):,} responses are longer than {limit:,} characters: their middle is left out of this "
        "page and stands in rollouts/step_N.jsonl."
    )
    return Packed(index, chunks, note if cut else None)


def _groups(runs: list[Run]) -> Iterator[tuple[int, int, Any, list[dict[str, Any]]]]:
    for number, run in enumerate(runs):
        for step, rollouts in run.rollouts:
            groups: dict[str, list[dict[str, Any]]] = {}
            for rollout in rollouts:
                groups.setdefault(str(rollout.get("question_id", rollout.get("question"))), []).append(rollout)
            for group in groups.values():
                yield number, step, group[0].get("question_id"), group


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
    return f"{text[:half]}\n\n[... {len(text) - 2 * half:,} characters left out of this page ...]\n\n{text[-half:]}"


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


def _compress(groups: list[dict[str, Any]]) -> str:
    raw = json.dumps(groups, ensure_ascii=False).encode("utf-8", errors="replace")
    return base64.b64encode(gzip.compress(raw, compresslevel=6, mtime=0)).decode("ascii")
