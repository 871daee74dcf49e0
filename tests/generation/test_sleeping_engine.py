"""An external engine that sleeps while the policy trains: it refuses to sample without weights, and may die asleep."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest
from arithmetic import come_from, sample
from torch import Tensor

from nemo_disco.generation.external.engine import ExternalEngine
from nemo_disco.generation.worker.rollout_worker.wire import RefusedError

Start = Callable[..., ExternalEngine]


def refuses_to_sample(engine: ExternalEngine) -> bool:
    """True if the engine's only replica is recorded as having no weights. It must refuse to sample."""
    (replica,) = engine.replicas
    replica.send({"op": "generate", "lengths": [], "seeds": [], "sampling": {}})
    with pytest.raises(RefusedError, match="a full refit must be committed first"):
        replica.receive()
    return replica.version is None


def test_between_sleep_and_the_commit_of_a_refit_nothing_is_sampled(start: Start, tensors: dict[str, Tensor]) -> None:
    engine = start()
    engine.update_weights(tensors.items, 0)
    assert come_from(sample(engine), tensors, 0)
    engine.sleep()
    assert refuses_to_sample(engine)
    engine.wake()
    assert refuses_to_sample(engine)
    engine.replicas[0].call(op="begin", version=1)
    assert refuses_to_sample(engine)
    engine.update_weights(tensors.items, 1)
    assert come_from(sample(engine), tensors, 1)


def test_a_replica_lost_while_asleep_is_started_again(
    start: Start, tensors: dict[str, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    engine = start(2)
    engine.update_weights(tensors.items, 0)
    engine.sleep()
    lost, other = (replica._process for replica in engine.replicas)
    assert lost is not None and other is not None
    os.kill(lost.pid, signal.SIGKILL)
    engine.wake()
    assert "wake: replica 0 was killed by SIGKILL" in caplog.text
    engine.update_weights(tensors.items, 1)
    assert come_from(sample(engine), tensors, 1)
    assert [replica._process for replica in engine.replicas][1] is other


@pytest.mark.parametrize("where", ["sleep", pytest.param("wake", marks=pytest.mark.slow)])
@pytest.mark.parametrize("how", ["raise", pytest.param("kill", marks=pytest.mark.slow)])
def test_a_replica_that_cannot_sleep_or_wake_is_started_again(
    where: str, how: str, start: Start, tensors: dict[str, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    engine = start(fault=where, how=how)
    engine.update_weights(tensors.items, 0)
    engine.sleep()
    assert refuses_to_sample(engine) and len(caplog.messages) == (where == "sleep")
    engine.wake()
    assert [message.partition(":")[0] for message in caplog.messages] == [where]
    engine.update_weights(tensors.items, 1)
    assert come_from(sample(engine), tensors, 1)
