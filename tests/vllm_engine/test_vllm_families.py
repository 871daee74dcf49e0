"""vLLM's log-probs against the policy's, for every family of the README, with padding rows in the vocabulary."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, LONG_ROPE, PARTIAL_ROPE, VARIANTS, model_config, save_family, to_rollouts
from vllm_process import SHAPE, start_vllm

from nemo_disco.generation.engine import SamplingParams
from nemo_disco.policy import parallel
from nemo_disco.policy.policy import Policy

pytestmark = pytest.mark.vllm
TOKENS = 100  # the other rows of the 130 are padding


# vLLM refuses activations but silu and windows in some of the layers, and leaves out the bias of Qwen3's o_proj.
NETWORKS = {family: {} for family in FAMILIES} | {
    name: {"hidden_act": "silu"} for name in VARIANTS if name not in ("qwen2-window", "smollm3-window")
}
NETWORKS["qwen3-biases"] |= {
    "attention_bias": False,
    "rope_parameters": LONG_ROPE | {name: [*LONG_ROPE[name], *[9.0] * 8] for name in ("short_factor", "long_factor")},
}
FACTORS = [1.0 + i for i in range(12)]  # of heads of 32 numbers 24 are rotated
for name in ("phi3-tied", "phi3-untied"):
    NETWORKS[name] = {"rope_parameters": PARTIAL_ROPE | {"short_factor": FACTORS, "long_factor": FACTORS[::-1]}}
LONGEST = 200  # with it the angles of longrope are the long ones


@pytest.mark.parametrize("family", NETWORKS)
def test_log_probs_equal_the_policys_and_padding_rows_are_never_sampled(family: str, tmp_path: Path) -> None:
    path = save_family(tmp_path / family, family, **SHAPE, **NETWORKS[family])
    config = model_config(path)
    parallel.start(config)
    policy = Policy(config, temperature=0.6, vocabulary=TOKENS, longest=LONGEST)
    generator = torch.Generator().manual_seed(5)
    requests = [p for n in (3, 17, 40) for p in [torch.randint(TOKENS, (n,), generator=generator).tolist()] * 4]
    engine = start_vllm(
        path, policy, tmp_path, max_length=LONGEST, tensor_parallel_size=2 if family == "qwen3-tied" else 1
    )
    try:
        engine.update_weights(policy.named_weights, 1)
        responses = engine.generate(requests, range(len(requests)), SamplingParams(0.6, 60))
        greedy = engine.generate(requests[::4], [0, 0, 0], SamplingParams(0.0, 20))
    finally:
        engine.close()
    assert max(token for r in [*responses, *greedy] for token in r.tokens) < TOKENS
    rollouts = to_rollouts(requests, responses)
    torch.testing.assert_close(policy.log_probs(rollouts)[0], rollouts.generation_log_probs, rtol=0, atol=1e-4)
