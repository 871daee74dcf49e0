"""Engines in processes of their own (vllm, tensorrt_llm) behind the contract: replicas, refit, and recovery.

On each node the first rank leads its replicas; the others take part in the collectives. A replica that is lost is
started anew and given all weights, and only what it had not answered is sampled again.
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

from nemo_disco.generation.engine import Finished, Outstanding, Response, SamplingParams
from nemo_disco.generation.external.refit import refit
from nemo_disco.generation.external.replica import SILENCE_S, Replica, ReplicaLostError
from nemo_disco.generation.worker.rollout_worker.wire import RefusedError
from nemo_disco.runtime.collectives import every
from nemo_disco.runtime.errors import UserError

# How often one refit or one generation is tried before the run stops.
ATTEMPTS = 3
log = logging.getLogger(__name__)


@dataclass
class _Request:
    """Prompts to sample from, which replica of this rank has which of them, and what has been answered."""

    prompts: Sequence[Sequence[int]]
    seeds: Sequence[int]
    sampling: SamplingParams
    finished: Finished | None
    shares: list[list[int]]
    found: dict[int, Response] = field(default_factory=dict)

    def take(self, index: int, response: Response) -> None:
        self.found[index] = response
        if self.finished is not None:
            self.finished(index, response)


class ExternalEngine:
    """Engine of the replicas that this rank leads (most ranks lead none) and of the other ranks'. All methods but
    `ask` and `close` are collectives."""

    def __init__(self, replicas: Sequence[Replica]) -> None:
        """Starts the replicas. Raises UserError if one cannot be built."""
        self.replicas = list(replicas)
        self.version = 0
        self._outstanding: Future[dict[int, Exception]] | None = None  # a request that nobody waits for yet
        self._weights: Callable[[], Iterable[tuple[str, Tensor]]] | None = None
        counts = every(lambda: len(self.replicas))
        self._first, self._total = sum(counts[: dist.get_rank()]), sum(counts)
        self._recover(dict.fromkeys(range(len(self.replicas))))

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: SamplingParams,
        finished: Finished | None = None,
    ) -> list[Response]:
        """See Engine.generate."""
        request = self._request(prompts, seeds, sampling, finished)
        return self._responses(request, self._run(request), self.version)

    def ask(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: SamplingParams,
        finished: Finished | None = None,
    ) -> Outstanding:
        """See EngineApart.ask. What it returns is the collective: its thread only reads the wire."""
        request = self._request(prompts, seeds, sampling, finished)
        outstanding: Future[dict[int, Exception]] = Future()

        def run() -> None:
            try:
                outstanding.set_result(self._run(request))
            except BaseException as problem:
                outstanding.set_exception(problem)

        def wait(version: int) -> list[Response]:
            problems = outstanding.result()
            self._outstanding = None
            return self._responses(request, problems, version)

        self._outstanding = outstanding
        # A daemon: a run that fails does not wait for its engine.
        threading.Thread(target=run, name="rollouts", daemon=True).start()
        return wait

    def update_weights(self, weights: Callable[[], Iterable[tuple[str, Tensor]]], version: int) -> None:
        """See Engine.update_weights."""
        self._weights = weights
        self._refit(version)

    def sleep(self) -> None:
        """The GPU memory of weights and cache; a no-op where the engine cannot (on a CPU)."""
        self._everywhere("sleep")

    def wake(self) -> None:
        """Afterwards the weights are missing: a refit must follow."""
        self._everywhere("wake")

    def close(self) -> None:
        for replica in self.replicas:
            replica.end()

    # --- refit and recovery ---

    def _refit(self, version: int) -> None:
        assert self._outstanding is None, "the engine was given weights before its responses were waited for"
        assert self._weights is not None, "no weights were ever given to the engine"
        self.version = version
        for _ in range(ATTEMPTS):
            behind = [i for i, replica in enumerate(self.replicas) if replica.version != version]
            found = refit(self._weights(), [self.replicas[i] for i in behind], version)
            problems = {behind[i]: problem for i, problem in found.items()}
            if not self._agree("refit", problems):
                return
            self._recover(problems)
        raise self._failure("refit", problems)

    def _recover(self, problems: dict[int, Any]) -> None:
        """Start anew what is not running (all at once). Raises UserError, on every rank, if it cannot be built."""
        lost = [self.replicas[i] for i, problem in problems.items() if not isinstance(problem, RefusedError)]
        refused = ""
        try:
            for replica in lost:
                replica.start()
            for replica in lost:
                replica.wait_ready()
        except (ReplicaLostError, RefusedError, OSError) as error:
            refused = str(error)
        if said := next(filter(None, every(lambda: refused)), ""):
            self.close()
            raise UserError(f"generation: the engine cannot be started: {said}")

    def _agree(self, what: str, problems: dict[int, Exception]) -> bool:
        """Whether any rank had a problem; each is said by the rank that had it."""
        for problem in problems.values():
            log.warning("%s: %s; trying again with all weights given anew", what, problem)
        return any(every(lambda: bool(problems)))

    def _failure(self, what: str, problems: dict[int, Exception]) -> UserError:
        said = next(filter(None, every(lambda: "; ".join(map(str, problems.values())))))
        self.close()
        return UserError(f"{what} failed {ATTEMPTS} times in a row: {said}")

    def _everywhere(self, request: str) -> None:
        asked = list(range(len(self.replicas)))
        for _ in range(ATTEMPTS):
            problems: dict[int, Exception] = {}
            for i in asked:
                replica = self.replicas[i]
                try:
                    replica.version = replica.ask(op=request)["version"]
                except ReplicaLostError as problem:
                    problems[i] = problem
                except RefusedError as problem:
                    replica.end()  # who knows what memory it holds
                    problems[i] = ReplicaLostError(f"{replica.name}: {problem}")
            if not self._agree(request, problems):
                return
            self._recover(problems)
            if request == "wake":  # what was just started is awake
                return
            asked = list(problems)
        raise self._failure(request, problems)

    # --- generation ---

    def _request(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: SamplingParams,
        finished: Finished | None,
    ) -> _Request:
        """Whole questions are dealt to the replicas, so that a group shares its prompt's prefix."""
        assert self._outstanding is None, "the engine was asked before its last responses were waited for"
        questions = [list(rows) for _, rows in groupby(range(len(prompts)), key=lambda i: tuple(prompts[i]))]
        shares = [
            [i for rows in questions[self._first + r :: self._total] for i in rows] for r in range(len(self.replicas))
        ]
        return _Request(prompts, seeds, sampling, finished, shares)

    def _responses(self, request: _Request, problems: dict[int, Exception], version: int) -> list[Response]:
        """After a first run and its problems, with more of them where replicas were lost. version: of the weights that
        the policy has now, for those."""
        attempts = 1
        while self._agree("generate", problems):
            if attempts == ATTEMPTS:
                raise self._failure("generation", problems)
            attempts += 1
            self._recover(problems)
            self._refit(version)
            problems = self._run(request)
        everything: dict[int, Response] = {}
        for share in every(lambda: request.found):
            everything |= share
        return [everything[i] for i in range(len(request.prompts))]

    def _run(self, request: _Request) -> dict[int, Exception]:
        """Each replica's share of what is not answered yet, at the same time; problems by replica. No collective."""
        shares = [[i for i in share if i not in request.found] for share in request.shares]
        problems: dict[int, Exception] = {}
        with selectors.DefaultSelector() as selector:
            for i, (replica, share) in enumerate(zip(self.replicas, shares, strict=True)):
                try:
                    if share:
                        _ask(replica, share, request)
                        selector.register(replica, selectors.EVENT_READ, i)
                except ReplicaLostError as problem:
                    problems[i] = problem
            while busy := list(selector.get_map().values()):
                # after a silence, `receive` says so of each
                for key in [key for key, _ in selector.select(SILENCE_S)] or busy:
                    i = key.data
                    try:
                        done = self._take_one(self.replicas[i], shares[i], request)
                    except (ReplicaLostError, RefusedError) as problem:
                        self.replicas[i].version = None
                        problems[i] = problem
                        done = True
                    if done:
                        selector.unregister(key.fd)
        return problems

    def _take_one(self, replica: Replica, share: Sequence[int], request: _Request) -> bool:
        """One message of a generating replica; whether it was the last. Raises RefusedError for other weights."""
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
        count, place = message["tokens"], message["response"]
        if not 0 <= place < len(share) or len(payload) != 8 * count:
            raise ReplicaLostError(
                f"{replica.name} answered request {place} of {len(share)} with {count} tokens in {len(payload)} bytes"
            )
        tokens = np.frombuffer(payload, np.int32, count).astype(np.int64)
        log_probs = np.frombuffer(payload, np.float32, offset=4 * count).copy()  # else it keeps the tokens' bytes too
        reason: Literal["stop", "length"] = "stop" if message["reason"] == "stop" else "length"
        response = Response(tokens, log_probs, reason, message["version"])
        request.take(share[place], response)
        return False


def _ask(replica: Replica, share: Sequence[int], request: _Request) -> None:
    flat, sampling = array("i", [token for i in share for token in request.prompts[i]]), request.sampling
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
    }
    replica.send(message, flat.tobytes())
