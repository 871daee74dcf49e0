"""Client for engines in processes of their own (vllm, tensorrt_llm): requests to the replicas, refit, and recovery.

On each node the first rank leads its replicas; the other ranks only take part in the collectives. A lost replica is
started again and given all weights, and only the prompts that it had not answered are sampled again.
"""

from __future__ import annotations

import logging
import selectors
import threading
from array import array
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal

import numpy as np
import torch.distributed as dist
from torch import Tensor

from nemo_disco.generation.engine import Deliver, PendingResponses, Response, SamplingParams
from nemo_disco.generation.external.refit import refit
from nemo_disco.generation.external.replica import SILENCE_S, Replica, ReplicaLostError
from nemo_disco.generation.worker.rollout_worker.wire import RefusedError, product
from nemo_disco.runtime.collectives import on_every_rank
from nemo_disco.runtime.errors import UserError

# Attempts at one refit or one generation before the run stops.
ATTEMPTS = 3
log = logging.getLogger(__name__)


@dataclass
class _Request:
    """A request to sample, and the responses so far. shares: indices of the prompts of each of this rank's replicas."""

    prompts: Sequence[Sequence[int]]
    seeds: Sequence[int]
    sampling: SamplingParams
    deliver: Deliver | None
    shares: list[list[int]]
    responses: dict[int, Response] = field(default_factory=dict)

    def add(self, index: int, response: Response) -> None:
        self.responses[index] = response
        if self.deliver is not None:
            self.deliver(index, response)


class ExternalEngine:
    """Client for all replicas; each rank drives the ones that it leads (most ranks lead none). All methods except
    `start_generating` and `close` are collectives."""

    def __init__(self, replicas: Sequence[Replica]) -> None:
        """Start the replicas. Raises UserError if one cannot be built."""
        self.replicas = list(replicas)
        self.version = 0
        self._pending: Future[dict[int, Exception]] | None = None  # of a request that was started and not waited for
        self._weights: Callable[[], Iterable[tuple[str, Tensor]]] | None = None
        counts = on_every_rank(lambda: len(self.replicas))
        self._first, self._total = sum(counts[: dist.get_rank()]), sum(counts)
        self._recover(dict.fromkeys(range(len(self.replicas))))

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: SamplingParams,
        deliver: Deliver | None = None,
    ) -> list[Response]:
        """See Engine.generate."""
        request = self._request(prompts, seeds, sampling, deliver)
        return self._responses(request, self._sample(request), self.version)

    def start_generating(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: SamplingParams,
        deliver: Deliver | None = None,
    ) -> PendingResponses:
        """See AsynchronousEngine. Only the returned function is a collective: the thread only reads messages."""
        request = self._request(prompts, seeds, sampling, deliver)
        pending: Future[dict[int, Exception]] = Future()

        def run() -> None:
            try:
                pending.set_result(self._sample(request))
            except BaseException as error:
                pending.set_exception(error)

        def wait(version: int) -> list[Response]:
            problems = pending.result()
            self._pending = None
            return self._responses(request, problems, version)

        self._pending = pending
        # A daemon thread: a run that fails does not wait for its engine.
        threading.Thread(target=run, name="rollouts", daemon=True).start()
        return wait

    def update_weights(self, weights: Callable[[], Iterable[tuple[str, Tensor]]], version: int) -> None:
        """See Engine.update_weights."""
        self._weights = weights
        self._refit(version)

    def sleep(self) -> None:
        """Free the GPU memory of weights and cache; does nothing if the engine cannot sleep (on a CPU)."""
        self._call_all("sleep")

    def wake(self) -> None:
        """Wake the engine, which then has no weights: a refit must follow."""
        self._call_all("wake")

    def close(self) -> None:
        """End the processes of the replicas that this rank leads."""
        for replica in self.replicas:
            replica.end()

    # --- refit and recovery ---

    def _refit(self, version: int) -> None:
        assert self._pending is None, "a refit was requested while responses are pending: wait for them first"
        assert self._weights is not None, "the engine has no weights yet: call update_weights first"
        self.version = version
        for _ in range(ATTEMPTS):
            behind = [i for i, replica in enumerate(self.replicas) if replica.version != version]
            failures = refit(self._weights(), [self.replicas[i] for i in behind], version)
            problems = {behind[i]: problem for i, problem in failures.items()}
            if not self._any_problem("refit", problems):
                return
            self._recover(problems)
        raise self._failure("refit", problems)

    def _recover(self, problems: dict[int, Any]) -> None:
        """Start the lost replicas again, all at once. problems: errors by replica; after a refusal a replica still
        runs. Raises UserError on every rank if a replica cannot be started."""
        lost = [self.replicas[i] for i, problem in problems.items() if not isinstance(problem, RefusedError)]
        failure = ""
        try:
            for replica in lost:
                replica.start()
            for replica in lost:
                replica.wait_ready()
        except (ReplicaLostError, RefusedError, OSError) as error:
            failure = str(error)
        if message := next(filter(None, on_every_rank(lambda: failure)), ""):
            self.close()
            raise UserError(f"generation: the engine cannot be started: {message}")

    def _any_problem(self, task: str, problems: dict[int, Exception]) -> bool:
        """True if any rank had a problem; each rank logs its own."""
        for problem in problems.values():
            log.warning("%s: %s; trying again with all weights given anew", task, problem)
        return any(on_every_rank(lambda: bool(problems)))

    def _failure(self, task: str, problems: dict[int, Exception]) -> UserError:
        """Close the engine and return the error that ends the run, the same on every rank."""
        message = next(filter(None, on_every_rank(lambda: "; ".join(map(str, problems.values())))))
        self.close()
        return UserError(f"{task} failed {ATTEMPTS} times in a row: {message}")

    def _call_all(self, op: str) -> None:
        """Send a request without arguments to all replicas; those that fail are started again."""
        remaining = list(range(len(self.replicas)))
        for _ in range(ATTEMPTS):
            problems: dict[int, Exception] = {}
            for i in remaining:
                replica = self.replicas[i]
                try:
                    replica.version = replica.call(op=op)["version"]
                except ReplicaLostError as problem:
                    problems[i] = problem
                except RefusedError as problem:
                    replica.end()  # the memory that it holds is unknown
                    problems[i] = ReplicaLostError(f"{replica.name}: {problem}")
            if not self._any_problem(op, problems):
                return
            self._recover(problems)
            if op == "wake":  # a replica that was just started is awake
                return
            remaining = list(problems)
        raise self._failure(op, problems)

    # --- generation ---

    def _request(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: SamplingParams,
        deliver: Deliver | None,
    ) -> _Request:
        """Divide the prompts among the replicas, by whole questions: a group then shares its prompt's prefix."""
        assert self._pending is None, "a request was made while responses are pending: wait for them first"
        questions = [list(group) for _, group in groupby(range(len(prompts)), key=lambda i: tuple(prompts[i]))]
        shares = [
            [i for group in questions[self._first + r :: self._total] for i in group] for r in range(len(self.replicas))
        ]
        return _Request(prompts, seeds, sampling, deliver, shares)

    def _responses(self, request: _Request, problems: dict[int, Exception], version: int) -> list[Response]:
        """All ranks' responses. problems: of the first attempt; the prompts of failed replicas are sampled again, from
        the policy's present weights, whose version is `version`."""
        attempts = 1
        while self._any_problem("generate", problems):
            if attempts == ATTEMPTS:
                raise self._failure("generation", problems)
            attempts += 1
            self._recover(problems)
            self._refit(version)
            problems = self._sample(request)
        responses = {i: response for share in on_every_rank(lambda: request.responses) for i, response in share.items()}
        return [responses[i] for i in range(len(request.prompts))]

    def _sample(self, request: _Request) -> dict[int, Exception]:
        """Let the replicas sample the unanswered prompts of their shares, all at the same time. Returns problems by
        replica. No collective."""
        shares = [[i for i in share if i not in request.responses] for share in request.shares]
        problems: dict[int, Exception] = {}
        with selectors.DefaultSelector() as selector:
            for i, (replica, share) in enumerate(zip(self.replicas, shares, strict=True)):
                try:
                    if share:
                        _send_request(replica, share, request)
                        selector.register(replica, selectors.EVENT_READ, i)
                except ReplicaLostError as problem:
                    problems[i] = problem
            while busy := list(selector.get_map().values()):
                # after SILENCE_S without a message, `receive` raises for each busy replica
                for key in [key for key, _ in selector.select(SILENCE_S)] or busy:
                    i = key.data
                    try:
                        done = self._receive_one(self.replicas[i], shares[i], request)
                    except (ReplicaLostError, RefusedError) as problem:
                        self.replicas[i].version = None
                        problems[i] = problem
                        done = True
                    if done:
                        selector.unregister(key.fd)
        return problems

    def _receive_one(self, replica: Replica, share: Sequence[int], request: _Request) -> bool:
        """Receive one message of a replica that samples; True if it was the last one. Raises RefusedError, and
        ReplicaLostError also for a response from other weights or with a wrong index or size."""
        message, payload = replica.receive()
        if "alive" in message:
            return False
        if message["version"] != self.version:
            replica.version = None
            replica.end()
            raise ReplicaLostError(
                f"{replica.name} sampled with the weights of version {message['version']}, not {self.version}"
            )
        if "done" in message:
            return True
        count, index = message["tokens"], message["response"]
        *shape, width = message.get("routes", [0, 0])
        if not 0 <= index < len(share) or len(payload) != 8 * count + product(shape) * width:
            raise ReplicaLostError(
                f"{replica.name} answered prompt {index} of {len(share)} with {count} tokens in {len(payload)} bytes"
            )
        tokens = np.frombuffer(payload, np.int32, count).astype(np.int64)
        log_probs = np.frombuffer(payload, np.float32, count, 4 * count).copy()  # a view would keep the payload
        routes = None
        if request.sampling.routes:
            read = len(request.prompts[share[index]]) + count - 1
            if len(shape) != 3 or shape[0] != read or width not in (1, 2):
                raise ReplicaLostError(
                    f"{replica.name} returned the experts of {shape[0]} of the {read} tokens that it read for a "
                    "response; model.moe_router_replay=engine needs them all"
                )
            routes = np.frombuffer(payload, (np.uint8, np.int16)[width - 1], offset=8 * count).reshape(shape).copy()
        reason: Literal["stop", "length"] = "stop" if message["reason"] == "stop" else "length"
        response = Response(tokens, log_probs, reason, message["version"], routes)
        request.add(share[index], response)
        return False


def _send_request(replica: Replica, share: Sequence[int], request: _Request) -> None:
    """Send a replica the prompts of its share."""
    tokens, sampling = array("i", [token for i in share for token in request.prompts[i]]), request.sampling
    message = {
        "op": "generate",
        "lengths": [len(request.prompts[i]) for i in share],
        "seeds": [request.seeds[i] for i in share],
        "sampling": {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "max_tokens": sampling.max_response_length,
        },
        "routes": sampling.routes,
    }
    replica.send(message, tokens.tobytes())
