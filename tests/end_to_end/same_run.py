"""Compares two runs of WHOLE_RUN settings bit for bit, except for times."""

from __future__ import annotations

import json
import warnings

import torch
from commands import read_metrics
from torch.distributed.checkpoint import FileSystemReader, load

TIMES = ("time/", "throughput/")


def read_run(run):
    """The state with which a run would go on, and the contents of its files; by name, without times."""
    step = run / "checkpoints/step_4"
    record = json.loads((step / "checkpoint.json").read_text())
    return {
        "weights": (run / "export/model.safetensors").read_bytes(),
        "metrics": [{k: v for k, v in line.items() if not k.startswith(TIMES)} for line in read_metrics(run)],
        "rollouts": [(run / f"rollouts/step_{n}.jsonl").read_text() for n in (1, 2, 3, 4)],
        "evaluations": [(run / f"evaluation/test.step_{n}.json").read_text() for n in (0, 4)],
        "loop": loop_state_without_times(record),
        "random state": record["random_state"],
        "optimizer steps": record["optimizer"],
    }


def loop_state_without_times(record):
    state = record["loop_state"]
    unfinished = {k: v for k, v in (state["unfinished"] or {}).items() if not k.startswith(TIMES)}
    return state | {"unfinished": unfinished}


def load_tensors(step):
    """Every tensor of a checkpoint, by name: weights and optimizer state."""
    reader = FileSystemReader(step)
    entries = reader.read_metadata().state_dict_metadata
    state = {name: torch.empty(e.size, dtype=e.properties.dtype) for name, e in entries.items() if hasattr(e, "size")}
    with warnings.catch_warnings(action="ignore"):  # it warns of loading in a single process
        load(state, storage_reader=reader, no_dist=True)
    return state


def assert_same_run(run, reference):
    actual, expected = read_run(run), read_run(reference)
    for name in expected:
        assert actual[name] == expected[name], name
    actual, expected = load_tensors(run / "checkpoints/step_4"), load_tensors(reference / "checkpoints/step_4")
    assert actual.keys() == expected.keys() and any("exp_avg_sq" in name for name in actual)
    assert [name for name in actual if not torch.equal(actual[name], expected[name])] == []
