"""The experts that vLLM chose, replayed by the trainer (model.moe_router_replay=engine).

vLLM's CPU build returns none of its own: these are those of rollout_worker/vllm_routes.py. On GPUs vLLM's own are
taken (not run).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from test_vllm_run import REPO, steps, wait_for_success
from test_vllm_run import start as start_command
from tiny_models import model_config, save_family, to_rollouts
from vllm_process import SHAPE, start_vllm

from nemo_disco.generation.engine import SamplingParams
from nemo_disco.policy import parallel
from nemo_disco.policy.policy import Policy

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize(("family", "ranks"), [("qwen3_moe-tied", 1), ("mixtral-untied", 2)])
def test_the_engines_experts_are_those_that_the_policys_routers_choose(family: str, ranks: int, tmp_path: Path) -> None:
    """In float32, after each of two refits, with more tokens than vLLM's cache has, so that some requests begin anew
    (with vLLM's blocks of 128 tokens none would). A choice that rounding turns round in a prompt counts 24 times."""
    config = model_config(save_family(tmp_path / family, family, **SHAPE), moe_router_replay="engine")
    parallel.start(config)
    policy = Policy(config, temperature=0.6)
    requests = [list(range(n, 2 * n)) for n in (3, 17, 40) for _ in range(24)]
    options = {"kv_cache_memory_bytes": 1 << 22, "block_size": 32}
    engine = start_vllm(Path(config.path), policy, tmp_path, routes=True, tensor_parallel_size=ranks, options=options)
    try:
        for version in (1, 2):
            with torch.no_grad():
                for parameter in policy.model.chunks[0].parameters():
                    parameter.mul_(1.1)
            engine.update_weights(policy.named_weights, version)
            responses = engine.generate(requests, range(len(requests)), SamplingParams(0.6, 60, routes=True))
            rollouts = to_rollouts(requests, responses)
            own = policy.target_values(rollouts, routes="record").routes
            assert own is not None and rollouts.routes is not None and rollouts.routes.dtype is torch.uint8
            chosen = torch.stack([own.chosen[layer] for layer in sorted(own.chosen)], 1)
            same = (rollouts.routes.sort(-1).values == chosen.sort(-1).values).all(-1).double().mean()
            assert same > 0.995, f"{float(same):.5f} of the pairs of a token and a layer"
            replayed = policy.target_values(rollouts, routes=policy.router_replay(rollouts)).log_probs
            torch.testing.assert_close(replayed, rollouts.generation_log_probs, rtol=0, atol=1e-4)
            assert all(r.routes is None for r in engine.generate(requests[:2], [0, 1], SamplingParams(0.6, 5)))
    finally:
        engine.close()


def test_a_run_replays_the_engines_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model with random weights, rewarded for an even number of characters, and trained fast enough that the routers
    of a step's later mini-batches would choose others."""
    (tmp_path / "even.py").write_text("def reward(response, answer):\n    return float(len(response) % 2 == 0)\n")
    monkeypatch.setenv("PYTHONPATH", f"{REPO}:{tmp_path}")
    assets = REPO / "assets/quickstart/model"
    vocabulary = json.loads((assets / "config.json").read_text())["vocab_size"]
    model = save_family(tmp_path / "model", "qwen3_moe-tied", vocab_size=vocabulary, **SHAPE)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        shutil.copy(assets / name, model / name)
    run = tmp_path / "run"
    settings = ("model.moe_router_replay=engine", f"model.path={model}", f"exp_manager.explicit_log_dir={run}")
    limits = ("generation.max_response_length=16", "trainer.max_steps=2", "evaluation.enabled=false")
    rewards = ("reward.verifier=even:reward", "reward.require_think=false")
    wait_for_success(start_command("train", *settings, *limits, *rewards, "model.optim.lr=3e-3"))
    assert [step["step"] for step in steps(run)] == [1, 2]
    for step in steps(run):
        assert step["mismatch/max_abs"] < 1e-3
        assert step["grad_norm"] > 0 and 0 < step["experts/changed"] < 0.5
