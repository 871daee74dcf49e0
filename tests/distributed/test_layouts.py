"""The project's promise: gradient, log-probs and responses do not depend on the layout.

There is one launch per world size, in which each case sets up its layout. The weights are changed after the old
log-probs are computed, so that the constraint's hinge is active and an error in the KL would be amplified.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tiny_models import (
    FAMILIES,
    VARIANTS,
    VOCABULARY,
    limit_vocabulary,
    load_transformers_model,
    model_config,
    random_rollouts,
    save_family,
    to_rollouts,
    transformers_log_probs,
)

from nemo_disco.algorithms import build_objective
from nemo_disco.algorithms.step import OldValues, accumulate_gradient
from nemo_disco.generation.engine import Response, SamplingParams
from nemo_disco.generation.megatron.engine import MegatronEngine
from nemo_disco.policy import parallel
from nemo_disco.policy.policy import Policy
from nemo_disco.runtime.collectives import is_first_rank

Layout = dict[str, Any]
TOKENS = 100  # vocabulary size in the cases where the output weight has more rows than that
HINGE = {"beta": 1e3, "delta": 1e-4}
# By the estimator of KL_hat. The KL over the likeliest tokens is computed in the vocabulary's shards.
CONSTRAINTS = {
    "k1": HINGE | {"estimator": "k1"},
    "k3": HINGE | {"estimator": "k3"},
    "top_k": HINGE | {"estimator": "top_k", "top_k": 5},
}
# The penalty's gradient by k3 and top_k is weighted by the differences between two policies, which bf16 rounds.
BF16_COSINE = {"k1": 0.999, "k3": 0.998, "top_k": 0.998}


def make_layout(
    tp: int = 1,
    pp: int = 1,
    cp: int = 1,
    sp: bool = False,
    vpp: int | None = None,
    budget: int = 256,
    ep: int = 1,
    etp: int | None = None,
) -> Layout:
    return {
        "expert_model_parallel_size": ep,
        "expert_tensor_parallel_size": etp,
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "context_parallel_size": cp,
        "sequence_parallel": sp,
        "virtual_pipeline_model_parallel_size": vpp,
        "token_budget": budget,
    }


def list_layouts(world_size: int) -> list[Layout]:
    """All combinations of the tested sizes that the world size allows."""
    return [
        make_layout(tp, pp, cp, sp, vpp, budget)
        for tp, pp, cp, sp, vpp in product((1, 2, 4), (1, 2, 4), (1, 2), (False, True), (None, 2))
        for budget in (96, 256, 1024)
        if world_size % (tp * pp * cp) == 0 and (tp > 1 or not sp) and (vpp is None or pp == 2)
    ]


REPRESENTATIVE = {
    1: [make_layout(), make_layout(budget=96)],
    2: [
        make_layout(),
        make_layout(tp=2),
        make_layout(tp=2, sp=True),
        make_layout(pp=2),
        make_layout(pp=2, vpp=2),
        make_layout(cp=2),
    ],
    4: [
        make_layout(tp=4, sp=True),
        make_layout(pp=4),
        make_layout(tp=2, pp=2, sp=True, budget=96),
        make_layout(tp=2, cp=2, sp=True),
        make_layout(pp=2, vpp=2),
        make_layout(),
    ],
}


class RecordingEngine(MegatronEngine):
    """Engine that records the requests which this rank samples and the responses which it hands over."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy, [1])
        self.requests: list[int] = []
        self.deliveries: list[tuple[int, list[int]]] = []

    def _decode_wave(self, wave: list[int], *rest: Any) -> Any:
        self.requests += wave
        return super()._decode_wave(wave, *rest)

    def hand_over(self, index: int, response: Response) -> None:
        self.deliveries.append((index, response.tokens.tolist()))


def gather_entries(entries: list[Any]) -> list[Any]:
    """The entries of all ranks, sorted."""
    shares: list[list[Any]] = [[]] * dist.get_world_size()
    dist.all_gather_object(shares, entries)
    return sorted(chain(*shares))


def perturb_weights(model: str) -> list[dict[str, torch.Tensor]]:
    """The model's weights by name, four times: plus and minus a random change, then plus and minus half of it.

    For one of them at least, KL_hat is above the constraint's delta. The sign for which it is far above comes first,
    since near delta the float32 error in KL_hat would be amplified: with half the change, float32 gradients differ by
    1.3e-5 on some processors, with the whole one by 5e-6.
    """
    weights, scale = load_file(f"{model}/model.safetensors"), 1e-2 if "llama" in model else -1e-2
    generator = torch.Generator().manual_seed(14)
    noise = {name: torch.randn(w.shape, generator=generator).double() for name, w in weights.items()}
    scales = (scale, -scale, scale / 2, -scale / 2)
    return [{n: w.double() + scale * noise[n] for n, w in weights.items()} for scale in scales]


def measure(
    model: str, layouts: list[Layout], dtypes: list[torch.dtype], vocabulary: int | None = None
) -> dict[torch.dtype, list[dict[str, Any]]]:
    """Figures of every layout, listed by dtype; empty on all ranks but the first.

    They are: log-probs and entropies [T]; the engine's responses, the requests that all ranks sampled for them and the
    responses that all ranks handed over; the largest difference of the engine's log-probs from the policy's; the whole
    gradient by the constraint's estimator; and the norm of the last one after megatron's own reduction.
    """
    moves = perturb_weights(model)
    rollouts = limit_vocabulary(random_rollouts(questions=8, group=4), vocabulary or VOCABULARY)
    prompts = [rollouts.prompt(i).tolist() for i in range(len(rollouts))]
    results: dict[torch.dtype, list[dict[str, Any]]] = {dtype: [] for dtype in dtypes}
    for dtype, changes in product(dtypes, layouts):
        config = model_config(Path(model), **changes)
        parallel.start(config)
        policy = Policy(config, dtype=dtype, temperature=0.6, vocabulary=vocabulary)
        engine = RecordingEngine(policy)
        responses = engine.generate(prompts, range(len(prompts)), SamplingParams(0.6, 8), engine.hand_over)
        objectives = {
            name: build_objective({"name": "disco", "tau": 1.0, "constraint": constraint})
            for name, constraint in CONSTRAINTS.items()
        }
        old = OldValues.compute(policy, objectives["top_k"], rollouts, reference=None)
        engine_rollouts = to_rollouts(prompts, responses)
        mismatch = policy.log_probs(engine_rollouts)[0] - engine_rollouts.generation_log_probs
        gradients = {}
        for name, objective in objectives.items():
            for weights in moves:
                policy.load(weights.__getitem__)
                result = accumulate_gradient(policy, objective, rollouts, old, everywhere=True)
                if result.metrics["constraint/active"]:
                    break
            else:
                raise AssertionError(f"the hinge with {name} is active for none of the changes of the weights")
            gradients |= {f"{name} {n}": g.clone() for n, g in policy.named_gradients()}
        results[dtype].append(
            {
                "log_probs": old.log_probs,
                "entropies": old.entropies,
                "responses": [r.tokens.tolist() for r in responses],
                "requests": gather_entries(engine.requests),
                "deliveries": gather_entries(engine.deliveries),
                "mismatch": float(mismatch.abs().max()),
                "gradients": gradients,
                "norm": policy.step().grad_norm if policy.optimizer is not None else None,
            }
        )
    return results if is_first_rank() else {}


def measure_models(models: list[str], layouts: list[Layout]) -> list[list[dict[str, Any]]]:
    """Figures of `measure` in float64 with a vocabulary of TOKENS, by model and layout."""
    return [measure(model, layouts, [torch.float64], TOKENS).get(torch.float64, []) for model in models]


@pytest.fixture(scope="module", params=["qwen2-tied", "llama-untied"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_family(tmp_path_factory.mktemp(request.param), request.param))


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def cosines(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> dict[str, float]:
    """Cosine similarity of two whole gradients, by the constraint's estimator."""
    result = {}
    for estimator in CONSTRAINTS:
        names = sorted(name for name in a if name.startswith(f"{estimator} "))
        flat = [torch.cat([gradients[name].double().flatten() for name in names]) for gradients in (a, b)]
        result[estimator] = float(torch.nn.functional.cosine_similarity(flat[0], flat[1], dim=0))
    return result


def assert_same(result: dict[str, Any], reference: dict[str, Any], tolerance: float, where: str) -> None:
    assert result["responses"] == reference["responses"], where
    assert result["mismatch"] < 1e-4, where
    torch.testing.assert_close(result["log_probs"], reference["log_probs"], rtol=0, atol=10 * tolerance)
    torch.testing.assert_close(result["entropies"], reference["entropies"], rtol=0, atol=10 * tolerance)
    for name, gradient in reference["gradients"].items():
        assert relative_difference(result["gradients"][name], gradient) <= tolerance, (where, name)
    if reference["norm"] is not None:
        assert result["norm"] == pytest.approx(reference["norm"], rel=tolerance), where


def check(
    run_on_ranks: Callable[..., list[Any]],
    model: str,
    cases: dict[int, list[Layout]],
    dtypes: dict[int, list[torch.dtype]],
) -> None:
    """Launch each world size with its dtypes, and compare float64 and float32 with the first layout in the same dtype,
    and bf16 with the first layout in float32."""
    references: dict[torch.dtype, dict[str, Any]] = {}
    for world_size, layouts in cases.items():
        for dtype, results in run_on_ranks(world_size, measure, model, layouts, dtypes[world_size])[0].items():
            references.setdefault(dtype, results[0])
            for changes, result in zip(layouts, results, strict=True):
                where = f"{world_size} processes, {dtype}, {changes}"
                # The ranks of a TP x PP group sample the same requests together.
                together = changes["tensor_model_parallel_size"] * changes["pipeline_model_parallel_size"]
                requests = range(len(result["responses"]))
                assert result["requests"] == sorted([*requests] * together), f"not sampled once per group: {where}"
                assert result["deliveries"] == [*enumerate(result["responses"])], f"not handed over once: {where}"
                if dtype is torch.bfloat16:
                    similarity = cosines(result["gradients"], references[torch.float32]["gradients"])
                    assert all(similarity[name] >= BF16_COSINE[name] for name in CONSTRAINTS), (where, similarity)
                else:
                    assert_same(result, references[dtype], 1e-9 if dtype is torch.float64 else 1e-5, where)


def test_a_representative_set(run_on_ranks: Callable[..., list[Any]], model: str) -> None:
    every = [torch.float64, torch.float32, torch.bfloat16]
    check(run_on_ranks, model, REPRESENTATIVE, {1: every, 2: every, 4: [torch.float64]})


def test_every_family(run_on_ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    """The families that the representative set leaves out and the variants, in one launch, with a vocabulary smaller
    than the output weight; the log-probs are compared with those of transformers."""
    rest = [
        "qwen2-untied",
        "qwen3-tied",
        "llama-tied",
        "mistral-untied",
        "phi3-tied",
        "olmo2-untied",
        "qwen3_moe-tied",
        "mixtral-untied",
        *VARIANTS,
    ]
    assert {name.split("-")[0] for name in rest} == {name.split("-")[0] for name in FAMILIES}
    models = [str(save_family(tmp_path / family, family)) for family in rest]
    layouts = [make_layout(), make_layout(tp=2, sp=True), make_layout(pp=2), make_layout(cp=2)]
    rollouts = limit_vocabulary(random_rollouts(questions=8, group=4), TOKENS)
    for family, path, results in zip(rest, models, run_on_ranks(2, measure_models, models, layouts)[0], strict=True):
        with torch.no_grad():
            expected = transformers_log_probs(load_transformers_model(Path(path)), rollouts, 0.6, TOKENS)
        torch.testing.assert_close(results[0]["log_probs"], expected, rtol=0, atol=1e-5)
        for changes, result in zip(layouts, results, strict=True):
            assert_same(result, results[0], 1e-9, f"{family}, {changes}")
            assert max(token for response in result["responses"] for token in response) < TOKENS


EXPERT_LAYOUTS = {
    1: [make_layout(), make_layout(budget=96)],
    2: [
        make_layout(ep=2),
        make_layout(ep=2, budget=96),
        make_layout(cp=2, ep=2),
        make_layout(tp=2, sp=True),
        make_layout(tp=2, sp=True, etp=1),
        make_layout(tp=2, sp=True, ep=2, etp=1),
    ],
    4: [
        make_layout(ep=4),
        make_layout(ep=2),
        make_layout(tp=2, sp=True, ep=2),
        make_layout(tp=2, sp=True, ep=4, etp=1),
        make_layout(pp=2, ep=2),
        make_layout(pp=2, vpp=2, ep=2),
        make_layout(tp=2, cp=2, sp=True, ep=2, etp=1),
    ],
}


def test_experts_at_every_kind_of_layout(run_on_ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    model = str(save_family(tmp_path, "qwen3_moe-untied"))
    every = [torch.float64, torch.float32]
    check(run_on_ranks, model, EXPERT_LAYOUTS, {1: every, 2: every, 4: [torch.float64]})


@pytest.mark.slow
@pytest.mark.parametrize("dtypes", [[torch.float64], [torch.float32, torch.bfloat16]], ids=["float64", "float32-bf16"])
def test_the_whole_matrix(run_on_ranks: Callable[..., list[Any]], model: str, dtypes: list[torch.dtype]) -> None:
    cases = {world_size: list_layouts(world_size) for world_size in (1, 2, 4)}
    assert sum(map(len, cases.values())) == 72
    check(run_on_ranks, model, cases, dict.fromkeys(cases, dtypes))
