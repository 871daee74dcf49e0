"""Samples on disk: whole batches survive a kill at any byte, and another evaluation begins anew."""

from __future__ import annotations

from pathlib import Path

from nemo_disco.evaluation.samples import Sample, SampleFile

IDENTITY = {"set": "s", "seed": 1}
BATCHES = [2, 2, 1]
REST = {"question_id": 1, "question": "?", "answer": ["1"], "sample": 0, "reward": 1.0, "correct": True}
SAMPLES: list[list[Sample]] = [
    [{**REST, "length": 3, "truncated": False, "response": f"é{i}{j}"} for j in range(size)]  # type: ignore[typeddict-item]
    for i, size in enumerate(BATCHES)
]


def open_file(path: Path, **changes: int) -> SampleFile:
    return SampleFile(path, IDENTITY | changes, BATCHES)


def test_a_file_cut_at_any_byte_keeps_its_whole_batches(tmp_path: Path) -> None:
    path = tmp_path / "deep/s.jsonl"
    file = open_file(path)
    assert file.done == []
    ends = []
    for batch in SAMPLES:
        file.append(batch)
        ends.append(path.stat().st_size)
    file.close()
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        file = open_file(path)
        complete = sum(end <= cut for end in ends)
        assert file.done == SAMPLES[:complete]
        for batch in SAMPLES[complete:]:
            file.append(batch)
        file.close()
        assert path.read_bytes() == whole


def test_another_evaluation_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    file = open_file(path)
    file.append(SAMPLES[0])
    file.close()
    again = open_file(path, seed=2)
    assert again.done == [] and b'"seed": 2' in path.read_bytes()
    again.close()
