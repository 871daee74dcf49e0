"""Comparison of two runs of the settings WHOLE, bit for bit, except times."""

from __future__ import annotations

import json
import warnings

import torch
from commands import metrics
from torch.distributed.checkpoint import FileSystemReader, load

TIMES = ("time/", "throughput/")


def everything(run):
    """The state that decides a run's future and the files of its past, except times."""
    step = run / "checkpoints/step_4"
    record = json.loads((step / "checkpoint.json").read_text())
    return {
        "weights": (run / "export/model.safetensors").read_bytes(),
        "metrics": [{k: v for k, v in line.items() if not k.startswith(TIMES)} for line in metrics(run)],
        "rollouts": [(run / f"rollouts/step_{n}.jsonl").read_text() for n in (1, 2, 3, 4)],
        "evaluations": [(run / f"evaluation/test.step_{n}.json").read_text() for n in (0, 4)],
        "loop": loop_state(record),
        "random state": record["random_state"],
        "optimizer steps": record["optimizer"],
    }


def loop_state(record):
    state = record["loop_state"]
    unfinished = {k: v for k, v in (state["unfinished"] or {}).items() if not k.startswith(TIMES)}
    return state | {"unfinished": unfinished}


def tensors(step):
    """Every tensor of a checkpoint, by name: the weights and the optimizer's."""
    reader = FileSystemReader(step)
    entries = reader.read_metadata().state_dict_metadata
    state = {name: torch.empty(e.size, dtype=e.properties.dtype) for name, e in entries.items() if hasattr(e, "size")}
    with warnings.catch_warnings(action="ignore"):  # that it loads in a single process
        load(state, storage_reader=reader, no_dist=True)
    return state


def assert_same(run, reference):
    mine, theirs = everything(run), everything(reference)
    for name in theirs:
        assert mine[name] == theirs[name], name
    mine, theirs = tensors(run / "checkpoints/step_4"), tensors(reference / "checkpoints/step_4")
    assert mine.keys() == theirs.keys() and any("exp_avg_sq" in name for name in mine)
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
