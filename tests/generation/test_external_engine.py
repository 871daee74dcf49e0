"""Replicas, refit and recovery of the external engine, on real worker processes with a fake engine (fake_engine.py)."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from arithmetic import PROMPTS, SAMPLING, SEEDS, come_from, sample
from fake_engine import response_tokens
from response_values import as_tuples
from torch import Tensor

from nemo_disco.generation.engine import PendingResponses, Response
from nemo_disco.generation.external import engine as external_engine
from nemo_disco.generation.external import refit, replica
from nemo_disco.generation.external.engine import ExternalEngine
from nemo_disco.generation.external.replica import Replica
from nemo_disco.generation.worker.rollout_worker import weights as worker_weights
from nemo_disco.generation.worker.rollout_worker.__main__ import connect
from nemo_disco.generation.worker.rollout_worker.tensors import checksum
from nemo_disco.generation.worker.rollout_worker.wire import Channel
from nemo_disco.runtime.errors import UserError


def test_two_replicas_sample_from_the_newest_weights(
    start: Callable[..., ExternalEngine], tensors: dict[str, Tensor]
) -> None:
    engine = start(2)
    arrivals: dict[int, Response] = {}
    for version in (0, 1):
        engine.update_weights(tensors.items, version)
        arrivals.clear()
        responses = engine.generate(PROMPTS, SEEDS, SAMPLING, arrivals.__setitem__)
        assert come_from(responses, tensors, version)
        assert as_tuples(arrivals[i] for i in range(len(PROMPTS))) == as_tuples(responses)  # every one was announced
        for tensor in tensors.values():
            tensor.mul_(1.5)
    assert {r.finish_reason for r in responses} == {"stop", "length"}
    engine.sleep()
    engine.wake()
    engine.update_weights(tensors.items, 2)
    assert come_from(sample(engine), tensors, 2)


def test_routes_are_returned_where_they_are_asked_for(
    start: Callable[..., ExternalEngine], tensors: dict[str, Tensor]
) -> None:
    engine = start(2, routes=[3, 2])
    engine.update_weights(tensors.items, 0)
    assert all(r.routes is None for r in sample(engine))
    responses = engine.generate(PROMPTS, SEEDS, replace(SAMPLING, routes=True))
    assert come_from(responses, tensors, 0)
    for prompt, response in zip(PROMPTS, responses, strict=True):
        assert response.routes is not None and response.routes.dtype == np.uint8
        read = np.array([*prompt, *response.tokens][:-1]) % 4
        assert (response.routes == read[:, None, None]).all() and response.routes.shape[1:] == (3, 2)


def test_an_engine_that_returns_no_routes_is_refused_by_the_setting(
    start: Callable[..., ExternalEngine], tensors: dict[str, Tensor]
) -> None:
    engine = start()
    engine.update_weights(tensors.items, 0)
    with pytest.raises(UserError, match=r"experts of 0 of the \d+ tokens .* model.moe_router_replay=engine"):
        engine.generate(PROMPTS, SEEDS, replace(SAMPLING, routes=True))


def test_many_small_buckets_are_one_refit(start: Callable[..., ExternalEngine], tensors: dict[str, Tensor]) -> None:
    engine = start(bucket_bytes=1)
    slot = engine.replicas[0].ready["staging"]["shape"][1]
    assert slot < max(t.nbytes for t in tensors.values()) / 4  # most tensors come in pieces
    engine.update_weights(tensors.items, 7)
    assert come_from(sample(engine), tensors, 7)


def test_nothing_is_sampled_before_a_full_refit(start: Callable[..., ExternalEngine]) -> None:
    engine = start()
    engine.replicas[0].send({"op": "generate", "lengths": [], "seeds": [], "sampling": {}})
    with pytest.raises(refit.RefusedError, match="a full refit must be committed first"):
        engine.replicas[0].receive()


def _omit_last(tensors: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
    return list(tensors.items())[:-1]


def _transpose_k_proj(tensors: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
    return [(n, t.T if n.endswith("k_proj.weight") else t) for n, t in tensors.items()]


def _repeat_first(tensors: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
    return [*tensors.items(), *list(tensors.items())[:1]]


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (_omit_last, r"1 of \d+ tensors were never sent: model\.\S+"),
        (_transpose_k_proj, r"k_proj.weight has shape \[64, 32\], the model's is \[32, 64\]"),
        pytest.param(_repeat_first, r"model\.\S+ came twice", marks=pytest.mark.slow),
        pytest.param(
            lambda t: [*t.items(), ("extra.weight", torch.ones(3))],
            "the model has no extra.weight",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_wrong_stream_stops_with_the_tensors_name(
    stream: Any, message: str, start: Callable[..., ExternalEngine], tensors: dict[str, Tensor]
) -> None:
    engine = start()
    engine.update_weights(tensors.items, 0)
    with pytest.raises(UserError, match=rf"refit failed 3 times in a row: refit: .*{message}"):
        engine.update_weights(lambda: stream(tensors), 1)


def _drop_first(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return entries[1:]


def _swap(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Exchange the names of two tensors that have the same shape."""
    for a in entries:
        for b in entries:
            if a["name"] < b["name"] and a["shape"] == b["shape"]:
                a["name"], b["name"] = b["name"], a["name"]
                return entries
    raise AssertionError("no two tensors have the same shape: this test needs a model with such a pair")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [(_drop_first, "1 of .* were sent but did not arrive"), (_swap, "2 of .* tensors arrived with other values")],
)
def test_weights_that_are_lost_or_swapped_on_the_way_are_sent_again(
    spoil: Any,
    message: str,
    start: Callable[..., ExternalEngine],
    tensors: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = start()
    flush, faults = refit.Sender._flush, []

    def flush_with_one_fault(sender: refit.Sender) -> None:
        if sender._entries and not faults:
            sender._entries = spoil(sender._entries)
            faults.append(True)
        flush(sender)

    monkeypatch.setattr(refit.Sender, "_flush", flush_with_one_fault)
    engine.update_weights(tensors.items, 1)
    assert faults and any(re.search(message, line) for line in caplog.messages)
    assert come_from(sample(engine), tensors, 1)


@pytest.mark.parametrize(
    ("how", "where", "at"),
    [
        ("kill", "refit", 5),
        ("kill", "generate", 3),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("kill", "finish", 0), ("raise", "refit", 5), ("raise", "finish", 0), ("raise", "generate", 3))
        ),
    ],
)
def test_an_engine_that_fails_half_way_is_given_all_weights_again(
    how: str, where: str, at: int, start: Callable[..., ExternalEngine], tensors: dict[str, Tensor]
) -> None:
    engine = start(2, fault=where, at=at, how=how)
    engine.update_weights(tensors.items, 4)
    arrivals: list[int] = []
    responses = engine.generate(PROMPTS, SEEDS, SAMPLING, lambda i, _: arrivals.append(i))
    assert come_from(responses, tensors, 4)
    assert sorted(arrivals) == list(range(len(PROMPTS)))  # answered prompts are not sampled again


@pytest.mark.slow
def test_an_engine_that_always_dies_stops_the_run_with_one_line(
    start: Callable[..., ExternalEngine], tensors: dict[str, Tensor]
) -> None:
    engine = start(fault="generate", at=0, how="kill", always=True)
    engine.update_weights(tensors.items, 0)
    with pytest.raises(UserError, match=r"generation failed 3 times in a row: replica 0 was killed by SIGKILL.*\.log$"):
        sample(engine)


@pytest.mark.slow
def test_a_hanging_engine_is_ended_and_started_again(
    start: Callable[..., ExternalEngine], tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(external_engine, "SILENCE_S", 1.0)
    monkeypatch.setattr(replica.Replica.receive, "__defaults__", (1.0,))
    engine = start(fault="generate", at=2, how="hang")
    engine.update_weights(tensors.items, 0)
    assert come_from(sample(engine), tensors, 0)


def test_responses_from_another_version_of_the_weights_are_refused(
    start: Callable[..., ExternalEngine], tensors: dict[str, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    engine = start()
    engine.update_weights(tensors.items, 1)
    stale = {name: t.clone() for name, t in tensors.items()}
    engine.version = 2  # the trainer has a newer version, which the engine has not received
    engine._weights = stale.items
    assert come_from(sample(engine), stale, 2)
    assert "sampled with the weights of version 1, not 2" in caplog.text


def start_generating(engine: ExternalEngine, arrivals: dict[int, Response]) -> PendingResponses:
    return engine.start_generating(PROMPTS, SEEDS, SAMPLING, arrivals.__setitem__)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_start_generating_samples_before_the_responses_are_waited_for(
    start: Callable[..., ExternalEngine], tensors: dict[str, Tensor]
) -> None:
    engine = start(2)
    engine.update_weights(tensors.items, 0)
    expected = as_tuples(sample(engine))
    arrivals: dict[int, Response] = {}
    pending = start_generating(engine, arrivals)
    wait_for(lambda: len(arrivals) == len(PROMPTS))
    with pytest.raises(AssertionError, match="request was made while responses are pending"):
        sample(engine)
    with pytest.raises(AssertionError, match="refit was requested while responses are pending"):
        engine.update_weights(tensors.items, 1)
    assert as_tuples(pending(1)) == expected == as_tuples(arrivals[i] for i in range(len(PROMPTS)))
    assert come_from(sample(engine), tensors, 0)


@pytest.mark.parametrize("how", ["kill", pytest.param("raise", marks=pytest.mark.slow)])
def test_prompts_lost_while_the_policy_trains_are_sampled_from_its_new_weights_under_their_version(
    how: str, start: Callable[..., ExternalEngine], tensors: dict[str, Tensor]
) -> None:
    engine = start(2, fault="generate", at=5, how=how)
    engine.update_weights(tensors.items, 3)
    old = {name: checksum(t) for name, t in tensors.items()}
    arrivals: dict[int, Response] = {}
    pending = start_generating(engine, arrivals)
    wait_for(lambda: len(arrivals) >= 5 + len(PROMPTS) // 2)  # one replica failed at its sixth, the other is done
    for tensor in tensors.values():
        tensor.mul_(1.5)
    responses = pending(4)
    new = {name: checksum(t) for name, t in tensors.items()}
    assert sorted({r.weight_version for r in responses}) == [3, 4]
    for prompt, seed, r in zip(PROMPTS, SEEDS, responses, strict=True):
        assert r.tokens.tolist() == response_tokens(
            {3: old, 4: new}[r.weight_version], prompt, seed, SAMPLING.max_response_length
        )
    engine.update_weights(tensors.items, 4)
    assert come_from(sample(engine), tensors, 4)


def test_an_engine_closed_while_it_samples_ends_at_once(
    start: Callable[..., ExternalEngine], tensors: dict[str, Tensor]
) -> None:
    engine = start(slow=60)
    engine.update_weights(tensors.items, 0)
    arrivals: dict[int, Response] = {}
    start_generating(engine, arrivals)
    wait_for(lambda: len(arrivals) > 0)
    process, (reader,) = engine.replicas[0]._process, [t for t in threading.enumerate() if t.name == "rollouts"]
    engine.close()
    reader.join(60)
    assert not reader.is_alive() and process is not None and process.poll() is not None


def test_the_error_of_an_engine_that_cannot_be_built_is_reported(start: Callable[..., ExternalEngine]) -> None:
    with pytest.raises(UserError, match="the engine cannot be started: ValueError: no such quantization"):
        start(unbuildable="no such quantization")


def test_a_worker_ends_with_its_run(start: Callable[..., ExternalEngine]) -> None:
    engine = start()
    process = engine.replicas[0]._process
    assert process is not None and process.stdin is not None
    process.stdin.close()  # as the operating system does when the run ends, however it ends
    wait_for(lambda: process.poll() is not None)


@pytest.mark.slow
def test_a_replica_on_another_host_gets_the_weights_and_an_unauthenticated_peer_nothing(
    start: Callable[..., ExternalEngine],
    tensors: dict[str, Tensor],
    other_host: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    listen, strangers = replica.Replica._listen, []

    def greet(stranger: Channel) -> None:
        with contextlib.suppress(OSError):
            stranger.authenticate(b"of another run", b"worker")

    def listen_with_a_stranger(this: Replica) -> Any:
        address = listen(this)
        strangers.append(Channel(connect(address)))  # before the worker can
        threading.Thread(target=greet, args=(strangers[0],)).start()
        return address

    monkeypatch.setattr(replica.Replica, "_listen", listen_with_a_stranger)
    engine = start(host=other_host)
    assert "a connection was refused: the peer does not know this run's secret" in caplog.text
    with pytest.raises(OSError):
        strangers[0].receive()
    engine.update_weights(tensors.items, 3)
    assert come_from(sample(engine), tensors, 3)


def test_the_worker_expects_the_weights_in_the_model_directory(model: Path, tensors: dict[str, Tensor]) -> None:
    assert worker_weights.expected_weights(str(model)) == {name: list(t.shape) for name, t in tensors.items()}
