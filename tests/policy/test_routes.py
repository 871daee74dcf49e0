"""Router replay: the old policy's experts are recorded and given to later passes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import by_file_name, load_transformers_model, model_config, random_rollouts, save_family

from nemo_disco.algorithms import build_objective
from nemo_disco.algorithms.step import OldValues, accumulate_gradient, measure_kl
from nemo_disco.policy import parallel
from nemo_disco.policy.policy import Policy
from nemo_disco.runtime.errors import UserError

DELTA = 1e-4


def build(directory: Path, dtype: torch.dtype = torch.float64, **changes: Any) -> Policy:
    config = model_config(directory, **changes)
    parallel.start(config)
    return Policy(config, dtype=dtype, temperature=0.6, with_optimizer=False)


def close_routers(directory: Path) -> dict[str, torch.Tensor]:
    """The model's weights, with routers whose experts are nearly equal: tiny changes turn choices round."""
    save_family(directory, "qwen3_moe-tied", num_experts_per_tok=1)
    weights = by_file_name(dict(load_transformers_model(directory).named_parameters()), "qwen3_moe")
    weights = {name: w.detach().clone() for name, w in weights.items()}
    for name, weight in weights.items():
        if name.endswith("mlp.gate.weight"):
            weight.copy_(weight[:1] + 1e-6 * torch.randn(weight.shape, dtype=weight.dtype))
    return weights


def test_a_change_of_experts_alone_moves_the_kl_beyond_delta_and_replay_removes_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights, rollouts = close_routers(tmp_path), random_rollouts(questions=8)
    kl, changed = {}, {}
    for replay in ("none", "trainer"):
        policy = build(tmp_path, moe_router_replay=replay)
        policy.load(weights.__getitem__)
        objective = build_objective({"name": "disco", "constraint": {"kind": "squared_hinge", "delta": DELTA}})
        old = OldValues.compute(policy, objective, rollouts, reference=None)
        noise = {name: w + 1e-6 * torch.randn_like(w) * name.endswith("mlp.gate.weight") for name, w in weights.items()}
        policy.load(noise.__getitem__)
        kl[replay] = measure_kl(policy, rollouts, old)
        result = accumulate_gradient(policy, objective, rollouts, old)
        changed[replay] = result.metrics.get("experts/changed")
        assert bool(result.metrics["constraint/active"]) == (replay == "none")
    assert kl["none"] > DELTA and abs(kl["trainer"]) < 1e-9
    assert changed["none"] is None and 0.1 < changed["trainer"] < 0.9


def test_recorded_routes_are_those_that_the_routers_chose_and_are_selected_by_response(tmp_path: Path) -> None:
    save_family(tmp_path, "mixtral-tied")
    policy, rollouts = build(tmp_path), random_rollouts()
    values = policy.target_values(rollouts, routes="record")
    assert values.routes is not None and values.routes.chosen.keys() == {1, 2, 3, 4}
    assert values.routes.chosen[1].dtype is torch.uint8
    assert values.routes.chosen[1].shape == (len(rollouts.tokens), 2)
    model = load_transformers_model(tmp_path)
    chosen: list[torch.Tensor] = []
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda _m, _i, out: chosen.append(out[2])) for layer in model.model.layers
    ]
    some = [i for i in range(len(rollouts)) if rollouts.response_lengths[i] > 0][2]
    model(torch.cat([rollouts.prompt(some), rollouts.response(some)])[None, :-1])
    for hook in hooks:
        hook.remove()
    own = torch.stack([*values.routes.select(rollouts, [some]).chosen.values()])[:, :-1].long()
    assert torch.equal(own.sort(-1).values, torch.stack(chosen).sort(-1).values)


def test_replaying_the_policys_own_routes_changes_nothing(tmp_path: Path) -> None:
    save_family(tmp_path, "qwen3_moe-untied")
    policy, rollouts = build(tmp_path, activations_checkpoint_granularity="full"), random_rollouts()
    values = policy.target_values(rollouts, routes="record")
    replayed = policy.target_values(rollouts, routes=values.routes)
    assert torch.equal(values.log_probs, replayed.log_probs)
    changed = policy.accumulate(rollouts, lambda _index, v: v.log_probs, routes=values.routes, everywhere=True)
    assert changed == 0


def test_the_engines_routes_are_those_of_the_old_log_probs_and_of_the_mini_batches(tmp_path: Path) -> None:
    """The engine's are those of other routers, as if its rounding had turned choices round."""
    torch.manual_seed(0)
    weights, rollouts = close_routers(tmp_path), random_rollouts()
    policy = build(tmp_path, moe_router_replay="engine")
    policy.load(weights.__getitem__)
    routes = policy.target_values(rollouts, routes="record").routes
    assert routes is not None
    noise = {name: w + 1e-6 * torch.randn_like(w) * name.endswith("mlp.gate.weight") for name, w in weights.items()}
    policy.load(noise.__getitem__)
    objective = build_objective({"name": "disco", "constraint": {"kind": "squared_hinge", "delta": DELTA}})
    with pytest.raises(UserError, match=r"model.moe_router_replay=engine: the rollouts have no experts"):
        OldValues.compute(policy, objective, rollouts, reference=None)

    stacked = torch.stack([routes.chosen[layer] for layer in sorted(routes.chosen)], 1)
    stacked[rollouts.token_offsets[1:] - 1] = 3  # of the last tokens, which no pass reads
    sampled = replace(rollouts, routes=stacked)
    old = OldValues.compute(policy, objective, sampled, reference=None)
    assert torch.equal(old.log_probs, policy.target_values(rollouts, routes=routes).log_probs)
    assert not torch.equal(old.log_probs, policy.log_probs(rollouts)[0])
    assert abs(measure_kl(policy, sampled, old)) < 1e-9
    some = torch.tensor([5, 2, 7])
    result = accumulate_gradient(policy, objective, sampled.select(some), old.select(sampled, some))
    assert 0.1 < result.metrics["experts/changed"] < 0.9

    with pytest.raises(UserError, match=r"1 of at least 5 experts in 4 layers, the model 1 of 4 in 4"):
        OldValues.compute(policy, objective, replace(sampled, routes=stacked + 1), reference=None)
