"""Samples on disk: complete batches survive a kill at any byte; an evaluation with another identity starts over."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_disco.evaluation.samples import EvaluationSample, SampleFile, SampleStream
from nemo_disco.runtime.files import remove

IDENTITY = {"set": "s", "seed": 1}
BATCHES = [2, 2, 1]
FIELDS = {"question_id": 1, "question": "?", "answer": ["1"], "sample": 0, "reward": 1.0, "correct": True}
SAMPLES: list[list[EvaluationSample]] = [
    [{**FIELDS, "length": 3, "truncated": False, "response": f"é{i}{j}"} for j in range(size)]  # type: ignore[typeddict-item]
    for i, size in enumerate(BATCHES)
]


def open_file(path: Path, **changes: int) -> SampleFile:
    return SampleFile(path, IDENTITY | changes, BATCHES)


def test_a_file_cut_at_any_byte_keeps_its_complete_batches(tmp_path: Path) -> None:
    path = tmp_path / "deep/s.jsonl"
    file = open_file(path)
    assert file.batches == []
    ends = []
    for batch in SAMPLES:
        file.append(batch)
        ends.append(path.stat().st_size)
    file.close()
    whole = path.read_bytes()
    for cut in sorted({*range(0, len(whole), 11), *(end + d for end in ends for d in (-1, 0) if end), 1}):
        path.write_bytes(whole[:cut])
        file = open_file(path)
        complete = sum(end <= cut for end in ends)
        assert file.batches == SAMPLES[:complete]
        for batch in SAMPLES[complete:]:
            file.append(batch)
        file.close()
        assert path.read_bytes() == whole


def test_an_evaluation_with_another_identity_starts_over(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    file = open_file(path)
    file.append(SAMPLES[0])
    file.close()
    again = open_file(path, seed=2)
    assert again.batches == [] and b'"seed": 2' in path.read_bytes()
    again.close()


def test_samples_of_another_identity_are_moved_and_can_be_moved_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """This happens at each change of the identity, and to the samples of the unfinished batch too."""
    path = tmp_path / "s.jsonl"
    for seed in (1, 2):
        with SampleStream(path, IDENTITY | {"seed": seed}, BATCHES) as stream:
            assert stream.batches == [] and stream.recovered == {}
            if seed == 1:
                stream.append(SAMPLES[0])
            stream.add(1, SAMPLES[1][1])
    open_file(path, seed=3).close()
    assert "seed changed" in caplog.text and f"{tmp_path}/replaced/2" in caplog.text
    for seed in (1, 2):
        for file in (tmp_path / f"replaced/{seed}").iterdir():
            file.rename(tmp_path / file.name)
        with SampleStream(path, IDENTITY | {"seed": seed}, BATCHES) as stream:
            assert stream.batches == SAMPLES[: 2 - seed] and stream.recovered == {1: SAMPLES[1][1]}


def test_samples_of_an_unfinished_batch_survive_repeated_kills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The samples are in some file at any time, also while rank 0 gathers them in its own file."""
    path = tmp_path / "s.jsonl"
    for rank, row in ((0, 1), (1, 0)):
        SampleStream(path, IDENTITY, BATCHES, rank, lambda value: ([], {}, value[2])).add(row, SAMPLES[0][row])

    def remove_and_die(path: Path) -> None:
        remove(path)
        if path.name == "s.rank_1.jsonl":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("nemo_disco.evaluation.samples.remove", remove_and_die)
        with pytest.raises(KeyboardInterrupt):
            SampleStream(path, IDENTITY, BATCHES)
    for _ in range(2):
        with SampleStream(path, IDENTITY, BATCHES) as stream:
            assert dict(stream.recovered) == {0: SAMPLES[0][0], 1: SAMPLES[0][1]}


@pytest.mark.parametrize("junk", [b"\0\0\0\n", b"{}\n", b"[" * 1000 + b"\n", b"\xff\n", b'{"response": 3}\n'])
def test_a_batch_with_a_damaged_sample_is_sampled_again(tmp_path: Path, junk: bytes) -> None:
    path = tmp_path / "s.jsonl"
    file = open_file(path)
    for batch in SAMPLES:
        file.append(batch)
    file.close()
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:4], junk, *lines[5:]]))  # the second sample of the second batch
    file = open_file(path)
    assert file.batches == SAMPLES[:1]
    file.close()


def test_samples_of_an_unfinished_batch_survive_a_kill(tmp_path: Path) -> None:
    """This holds whichever rank wrote them, but not for samples of another evaluation or of another batch."""
    path = tmp_path / "s.jsonl"
    for rank, row in ((0, 1), (1, 0)):
        SampleStream(path, IDENTITY, BATCHES, rank, lambda value: ([], {}, value[2])).add(row, SAMPLES[0][row])
    with SampleStream(path, IDENTITY | {"seed": 2}, BATCHES) as other:
        assert other.recovered == {}
    for rank, row in ((0, 1), (1, 0)):
        SampleStream(path, IDENTITY, BATCHES, rank, lambda value: ([], {}, value[2])).add(row, SAMPLES[0][row])
    with SampleStream(path, IDENTITY, BATCHES) as stream:
        assert dict(stream.recovered) == {0: SAMPLES[0][0], 1: SAMPLES[0][1]}
        stream.append(SAMPLES[0])
        assert stream.recovered == {} and [p.name for p in tmp_path.glob("s.rank*")] == []
        assert [s for batch in stream.batches for s in batch] == SAMPLES[0]


def test_ranks_whose_weight_files_differ_only_in_time_share_an_evaluation(tmp_path: Path) -> None:
    """The times differ if the model was copied to each machine. The samples of a rank there survive a kill too."""
    path = tmp_path / "s.jsonl"
    shared: list[object] = []
    SampleStream(path, IDENTITY, BATCHES, 0, lambda value: shared.append(value) or value)
    SampleStream(path, IDENTITY | {"weights": 2}, BATCHES, 1, lambda _: shared[0]).add(1, SAMPLES[0][1])
    with SampleStream(path, IDENTITY, BATCHES) as stream:
        assert dict(stream.recovered) == {1: SAMPLES[0][1]}
