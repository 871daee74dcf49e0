"""The megatron engine against the policy's log-probs and transformers' greedy decoding, on prompts of many lengths."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from response_values import as_tuples, token_lists
from tiny_models import (
    FAMILIES,
    VARIANTS,
    VOCABULARY,
    load_transformers_model,
    model_config,
    save_family,
    to_rollouts,
    transformers_log_probs,
)
from transformers import AutoModelForCausalLM

from nemo_disco.generation.engine import Response, SamplingParams
from nemo_disco.generation.megatron import engine as megatron_engine
from nemo_disco.generation.megatron import in_place as in_place_decoding
from nemo_disco.generation.megatron.engine import MegatronEngine
from nemo_disco.generation.megatron.wave import Rows
from nemo_disco.policy import parallel
from nemo_disco.policy.policy import Policy
from nemo_disco.runtime.errors import UserError

STOP = [1, 7]


@pytest.fixture(scope="module", params=[*FAMILIES, *VARIANTS])
def model_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture
def engine(model_path: Path) -> MegatronEngine:
    return build(model_path)


def build(model_path: Path, vocabulary: int | None = None) -> MegatronEngine:
    config = model_config(model_path)
    parallel.start(config)
    return MegatronEngine(Policy(config, temperature=0.6, vocabulary=vocabulary), STOP)


# For tests of behaviour that does not depend on the architecture.
one_family = pytest.mark.parametrize("model_path", ["qwen3-untied"], indirect=True)


def prompts(count: int = 6, copies: int = 1) -> list[list[int]]:
    """Random prompts of 1 to 19 tokens, each repeated `copies` times in a row."""
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, 20, (count,), generator=generator).tolist()
    return [p for n in lengths for p in [torch.randint(2, VOCABULARY, (n,), generator=generator).tolist()] * copies]


@pytest.mark.parametrize("in_place", [False, True], ids=["plain", "in place"])
def test_log_probs_equal_transformers_and_the_policys(engine: MegatronEngine, model_path: Path, in_place: bool) -> None:
    engine.in_place = in_place
    check_log_probs(engine, model_path, VOCABULARY)


@one_family
@pytest.mark.parametrize("in_place", [False, True], ids=["plain", "in place"])
def test_padding_rows_of_the_vocabulary_are_never_sampled(model_path: Path, in_place: bool) -> None:
    engine = build(model_path, vocabulary=100)
    engine.in_place = in_place
    assert max(check_log_probs(engine, model_path, 100)) < 100
    assert max(check_log_probs(build(model_path), model_path, VOCABULARY)) >= 100


def check_log_probs(engine: MegatronEngine, model_path: Path, vocabulary: int) -> list[int]:
    """Sample responses, compare their log-probs with the policy's and transformers', and return all their tokens."""
    requests = [[token % 100 for token in prompt] for prompt in prompts(copies=4)]
    responses = engine.generate(requests, range(len(requests)), SamplingParams(0.6, 50))
    rollouts = to_rollouts(requests, responses)
    log_probs, _ = engine.policy.log_probs(rollouts)
    torch.testing.assert_close(log_probs, rollouts.generation_log_probs, rtol=0, atol=1e-4)
    with torch.no_grad():
        expected = transformers_log_probs(load_transformers_model(model_path), rollouts, 0.6, vocabulary)
    torch.testing.assert_close(rollouts.generation_log_probs.double(), expected, rtol=0, atol=1e-4)
    return [token for tokens in token_lists(responses) for token in tokens]


def test_greedy_tokens_equal_transformers(engine: MegatronEngine, model_path: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    for prompt, response in zip(prompts(), engine.generate(prompts(), [0] * 6, SamplingParams(0.0, 30)), strict=True):
        ids = reference.generate(
            torch.tensor([prompt]), max_new_tokens=30, do_sample=False, eos_token_id=STOP, pad_token_id=0
        )
        assert response.tokens.tolist() == ids[0, len(prompt) :].tolist()


@one_family
def test_a_response_ends_with_its_stop_token_or_at_the_limit(engine: MegatronEngine) -> None:
    responses = engine.generate(prompts(copies=8), range(48), SamplingParams(1.0, 12))
    assert {r.finish_reason for r in responses} == {"stop", "length"}
    for r in responses:
        assert not set(r.tokens[:-1]) & set(STOP)
        assert (r.tokens[-1] in STOP) == (r.finish_reason == "stop")
        assert len(r.tokens) == 12 or r.finish_reason == "stop"


@one_family
def test_a_request_samples_the_same_alone_in_a_batch_and_in_waves(
    engine: MegatronEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests, seeds, sampling = prompts(copies=4), list(range(24)), SamplingParams(0.8, 30)
    together = token_lists(engine.generate(requests, seeds, sampling))
    alone = [engine.generate([p], [s], sampling)[0].tokens.tolist() for p, s in zip(requests, seeds, strict=True)]
    assert together == alone
    monkeypatch.setattr(megatron_engine, "_CPU_CACHE_BYTES", 200_000)  # a few rows a wave
    assert token_lists(engine.generate(requests, seeds, sampling)) == together
    assert token_lists(engine.generate(requests, [s + 1 for s in seeds], sampling)) != together


@one_family
def test_responses_carry_the_weight_version(engine: MegatronEngine) -> None:
    engine.update_weights(engine.policy.named_weights, version=3)
    assert engine.generate(prompts(1), [0], SamplingParams(1.0, 2))[0].weight_version == 3


@one_family
def test_responses_come_from_changed_weights_at_once(engine: MegatronEngine) -> None:
    before = token_lists(engine.generate(prompts(), [0] * 6, SamplingParams(0.0, 20)))
    with torch.no_grad():
        for p in engine.policy.model.chunks[0].parameters():
            p.mul_(1.5)
    assert token_lists(engine.generate(prompts(), [0] * 6, SamplingParams(0.0, 20))) != before


@one_family
@pytest.mark.parametrize(
    "sampling", [SamplingParams(1.0, 70), SamplingParams(0.0, 30), SamplingParams(0.9, 40, top_p=0.8, top_k=20)]
)
def test_decoding_in_place_gives_the_same_responses(
    engine: MegatronEngine, sampling: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps that CUDA replays as a graph run one by one here: rows end and leave the batch, and the cache grows."""
    requests, seeds = prompts(copies=8), range(48)
    expected = engine.generate(requests, seeds, sampling)
    monkeypatch.setattr(in_place_decoding, "_CHECK_STEPS", 7)
    engine.in_place = True
    selections = []
    select = Rows.select
    monkeypatch.setattr(Rows, "select", lambda rows, keep: selections.append(len(keep)) or select(rows, keep))
    in_place = engine.generate(requests, seeds, sampling)
    assert token_lists(in_place) == token_lists(expected)
    assert [r.finish_reason for r in in_place] == [r.finish_reason for r in expected]
    for actual, reference in zip(in_place, expected, strict=True):
        np.testing.assert_allclose(actual.log_probs, reference.log_probs, rtol=0, atol=1e-4)
    assert selections or sampling.temperature == 0.0, "no row ever left the batch"


def in_order(arrivals: list[tuple[int, Response, int]]) -> list[Any]:
    """The responses that `deliver` received, in the order of the prompts; each prompt must occur exactly once."""
    assert sorted(place for place, _, _ in arrivals) == list(range(len(arrivals)))
    return as_tuples(response for _, response, _ in sorted(arrivals, key=lambda entry: entry[0]))


@one_family
@pytest.mark.parametrize("in_place", [False, True], ids=["plain", "in place"])
def test_deliver_is_called_once_for_each_response_when_its_row_ends(
    engine: MegatronEngine, in_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoding in place calls `deliver` at the next check of the rows. Several waves call it as one wave does."""
    check_steps, limit, calls = 7, 40, 0
    monkeypatch.setattr(in_place_decoding, "_CHECK_STEPS", check_steps)
    forward = engine.decoder.forward

    def count_call(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        return forward(*arguments)

    monkeypatch.setattr(engine.decoder, "forward", count_call)
    engine.in_place = in_place
    requests, seeds, sampling = prompts(copies=8), range(48), SamplingParams(1.0, limit)
    expected = engine.generate(requests, seeds, sampling)
    assert {r.finish_reason for r in expected} == {"stop", "length"}
    arrivals: list[tuple[int, Response, int]] = []
    calls = 0
    responses = engine.generate(requests, seeds, sampling, lambda i, r: arrivals.append((i, r, calls)))
    assert as_tuples(responses) == as_tuples(expected)
    assert in_order(arrivals) == as_tuples(responses)
    for _, response, steps in arrivals:
        assert 0 <= steps - len(response.tokens) < (check_steps if in_place else 1)
    monkeypatch.setattr(megatron_engine, "_CPU_CACHE_BYTES", 200_000)  # a few rows a wave
    arrivals.clear()
    responses = engine.generate(requests, seeds, sampling, lambda i, r: arrivals.append((i, r, calls)))
    assert in_order(arrivals) == as_tuples(responses)


@one_family
@pytest.mark.parametrize("in_place", [False, True])
def test_attention_masks_are_aligned_and_cudnn_is_off(
    engine: MegatronEngine, in_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA copies a mask unless its rows begin at multiples of 8 elements; cuDNN would make a plan for every token."""
    attention = torch.nn.functional.scaled_dot_product_attention
    strides = set()

    def check_mask(*args: torch.Tensor, attn_mask: torch.Tensor, **options: object) -> torch.Tensor:
        strides.update(attn_mask.stride()[:-1])
        assert attn_mask.stride(-1) == 1
        assert torch.backends.cuda.flash_sdp_enabled() and not torch.backends.cuda.cudnn_sdp_enabled()
        return attention(*args, attn_mask=attn_mask, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", check_mask)
    engine.in_place = in_place
    engine.generate(prompts(copies=8), range(48), SamplingParams(1.0, 70))
    assert strides and all(stride % 8 == 0 for stride in strides)


def _add_bias(model: Any) -> None:
    projection = model.decoder.layers[2].self_attention.linear_proj
    projection.bias = torch.nn.Parameter(torch.linspace(-2, 2, 64))


def _wrap_mlp(model: Any) -> None:
    mlp = model.decoder.layers[1].mlp
    mlp.register_forward_hook(lambda _module, _input, output: (-3 * output[0], output[1]))


@one_family
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("change", [_add_bias, _wrap_mlp])
def test_the_network_that_is_sampled_from_is_the_policys_whatever_it_computes(
    engine: MegatronEngine, change: Callable[[Any], None], in_place: bool
) -> None:
    engine.in_place = in_place
    requests, sampling = prompts(copies=2), SamplingParams(0.6, 30)
    before = engine.generate(requests, range(12), sampling)
    change(engine.policy.model.chunks[0])
    responses = engine.generate(requests, range(12), sampling)
    assert token_lists(responses) != token_lists(before)
    rollouts = to_rollouts(requests, responses)
    log_probs, _ = engine.policy.log_probs(rollouts)
    torch.testing.assert_close(log_probs, rollouts.generation_log_probs, rtol=0, atol=1e-4)


@one_family
@pytest.mark.parametrize("part", ["softmax_type=learnable", "TransformerLayer"])
def test_attention_that_is_not_decoded_is_refused_by_name(engine: MegatronEngine, part: str) -> None:
    model = engine.policy.model.chunks[0]
    if part == "TransformerLayer":
        model.decoder.layers[2].__class__ = TransformerLayer
    else:
        model.config.softmax_type = "learnable"
    with pytest.raises(UserError, match=f"does not compute {part} of this network"):
        MegatronEngine(engine.policy, STOP)
