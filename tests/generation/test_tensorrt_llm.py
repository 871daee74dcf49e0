"""The worker's TensorRT-LLM engine against a fake with the published signatures. None of this has run on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fake_tensorrt_llm as fake
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import VOCABULARY, save_model

from nemo_disco.generation.worker.rollout_worker import tensorrt_llm as adapter
from nemo_disco.generation.worker.rollout_worker.tensors import ALIGNMENT, checksum
from nemo_disco.generation.worker.rollout_worker.weights import RefitReceiver
from nemo_disco.generation.worker.rollout_worker.wire import RefusedError


class OnCpu(adapter.WorkerEngine):
    """The engine without the two methods that need a GPU: it stages weights in plain memory and shares that memory."""

    def open_staging(self, _path: str, shape: tuple[int, int], _remote: bool) -> list[dict[str, Any]]:
        self.broadcast = None
        self.slots = torch.zeros(shape, dtype=torch.uint8)
        return [{}]

    def share(self, weights: list[tuple[str, torch.Tensor]]) -> dict[str, list[Any]]:
        # rebuild_cuda_tensor's seventh argument is the device, and the extension sets it
        return {"GPU-0": [(n, (lambda *args: args[0], (t, 0, 0, 0, 0, 0, "device", 0))) for n, t in weights]}


def build(monkeypatch: pytest.MonkeyPatch, version: str, model: Path, **changes: Any) -> OnCpu:
    fake.install(monkeypatch, version)
    settings = {
        "model": str(model),
        "dtype": "bfloat16",
        "stop_token_ids": [1, 7],
        "max_length": 200,
        "tensor_parallel_size": 1,
        "trust_remote_code": False,
        "quantization": None,
        "vocabulary": VOCABULARY,
        "rows": VOCABULARY,
        "sleeps": True,
        "options": {},
    }
    return OnCpu(settings | changes)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "llama", tied=False)


def refit(engine: OnCpu, model: Path, version: int) -> RefitReceiver:
    """Put the model's weights into the engine, one tensor in each bucket."""
    weights = RefitReceiver(engine, str(model), torch.bfloat16, remote=False, bucket_bytes=1)
    weights.begin(version)
    checksums = {}
    for i, (name, tensor) in enumerate(load_file(model / "model.safetensors").items()):
        tensor = tensor.bfloat16()
        raw = tensor.reshape(-1).view(torch.uint8)
        engine.slots[i % 2, ALIGNMENT : ALIGNMENT + len(raw)] = raw
        piece = {"name": name, "shape": list(tensor.shape), "offset": ALIGNMENT, "first": 0, "bytes": len(raw)}
        weights.load_bucket(i % 2, [piece], bytearray())
        checksums[name] = checksum(tensor)
    weights.commit(version, checksums)
    return weights


@pytest.mark.parametrize("version", ["1.2.0", "1.3.0rc1"])
def test_every_bucket_reaches_the_ranks_and_the_commit_finishes_the_refit(
    version: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build(monkeypatch, version, model)
    rank = fake.LLM.last.rank
    rank.prefix_cache = True
    # A bucket must have room for an offset before the largest tensor.
    monkeypatch.setattr("nemo_disco.generation.worker.rollout_worker.weights.ALIGNMENT", 2**16)
    assert refit(engine, model, 3).version == 3
    expected = {n: t.bfloat16() for n, t in load_file(model / "model.safetensors").items()}
    assert rank.weights.keys() == expected.keys()
    assert all(torch.equal(rank.weights[name], expected[name]) for name in expected)
    assert not rank.open and not rank.prefix_cache
    assert engine.sleep() and rank.asleep
    engine.wake()
    assert not rank.asleep


def test_requests_have_the_sampling_parameters_and_processed_log_probs(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build(monkeypatch, "1.2.0", model)
    responses: dict[int, tuple[Any, Any, str]] = {}

    def deliver(index: int, tokens: Any, log_probs: Any, reason: str) -> None:
        responses[index] = (tokens, log_probs, reason)

    sampling = {"temperature": 0.6, "top_p": 1.0, "top_k": 0, "max_tokens": 9}
    engine.generate([[5, 6], [8]], [11, 12], sampling, deliver, lambda: None)
    assert responses == {0: ([5, 6, 1], [-0.25] * 3, "stop"), 1: ([8, 1], [-0.25] * 2, "stop")}
    requests = sorted(fake.LLM.last.requests, key=lambda p: p.seed)
    assert [p.seed for p in requests] == [11, 12]
    for parameters in requests:
        assert not parameters.greedy  # it would be greedy if top_k and top_p were both None
        assert (parameters.temperature, parameters.max_tokens, parameters.logprobs_mode) == (0.6, 9, "processed")
        assert parameters.include_stop_str_in_output and parameters.stop_token_ids == [1, 7]
    engine.generate([[5]], [0], sampling | {"temperature": 0.0}, deliver, lambda: None)
    assert fake.LLM.last.requests[-1].greedy


def test_padding_rows_of_the_vocabulary_are_hidden(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = build(monkeypatch, "1.2.0", model, vocabulary=VOCABULARY - 3)
    sampling = {"temperature": 0.6, "top_p": 1.0, "top_k": 0, "max_tokens": 9}
    engine.generate([[5, 6]], [11], sampling, lambda *_: None, lambda: None)
    bias = fake.LLM.last.requests[0].embedding_bias
    assert bias.shape == (VOCABULARY,) and not bias[:-3].any() and bool((bias[-3:] == -torch.inf).all())


def test_a_version_without_a_needed_part_is_refused_by_name(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RefusedError, match=r"TensorRT-LLM 1.1.0 has no logprobs_mode.*use 1.2 or later"):
        build(monkeypatch, "1.1.0", model)
    monkeypatch.setitem(fake.VERSIONS, "1.2.0", fake.COMMON)
    with pytest.raises(RefusedError, match=r"cannot sleep: set generation\.colocated=false"):
        build(monkeypatch, "1.2.0", model)
    assert build(monkeypatch, "1.2.0", model, sleeps=False).sleep() is False


def test_quantization_is_passed_to_the_engine(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(monkeypatch, "1.3.0rc1", model, quantization="fp8")
    assert fake.LLM.last.kwargs["quant_config"] == {"quant_algo": "FP8"}
