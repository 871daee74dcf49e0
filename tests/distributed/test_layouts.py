"""The project's promise: gradient, log-probs and responses do not depend on the layout.

One launch per world size, in which each case sets up its layout. The hinge is active (the weights are changed after the
old log-probs are computed), so that an error in the KL would be amplified.
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
    VOCABULARY,
    answered,
    below,
    model_config,
    random_rollouts,
    reference_log_probs,
    reference_model,
    save_family,
)

from nemo_disco.algorithms import build_objective
from nemo_disco.algorithms.step import OldValues, accumulate_gradient
from nemo_disco.generation.engine import Response, SamplingParams
from nemo_disco.generation.megatron.engine import MegatronEngine
from nemo_disco.policy import parallel
from nemo_disco.policy.policy import Policy
from nemo_disco.runtime.collectives import is_first_rank

Layout = dict[str, Any]
TOKENS = 100  # size of the vocabulary in the cases where the output weight has more rows
OBJECTIVE = {"name": "disco", "tau": 1.0, "constraint": {"beta": 1e3, "delta": 1e-4}}


def layout(
    tp: int = 1, pp: int = 1, cp: int = 1, sp: bool = False, vpp: int | None = None, budget: int = 256
) -> Layout:
    return {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "context_parallel_size": cp,
        "sequence_parallel": sp,
        "virtual_pipeline_model_parallel_size": vpp,
        "token_budget": budget,
    }


def every_layout(world_size: int) -> list[Layout]:
    return [
        layout(tp, pp, cp, sp, vpp, budget)
        for tp, pp, cp, sp, vpp in product((1, 2, 4), (1, 2, 4), (1, 2), (False, True), (None, 2))
        for budget in (96, 256, 1024)
        if world_size % (tp * pp * cp) == 0 and (tp > 1 or not sp) and (vpp is None or pp == 2)
    ]


REPRESENTATIVE = {
    1: [layout(), layout(budget=96)],
    2: [layout(), layout(tp=2), layout(tp=2, sp=True), layout(pp=2), layout(pp=2, vpp=2), layout(cp=2)],
    4: [
        layout(tp=4, sp=True),
        layout(pp=4),
        layout(tp=2, pp=2, sp=True, budget=96),
        layout(tp=2, cp=2, sp=True),
        layout(pp=2, vpp=2),
        layout(),
    ],
}


class Recording(MegatronEngine):
    """Records the requests that this rank samples, and the responses that it hands over."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy, [1])
        self.sampled: list[int] = []
        self.handed: list[tuple[int, list[int]]] = []

    def _decode_wave(self, wave: list[int], *rest: Any) -> Any:
        self.sampled += wave
        return super()._decode_wave(wave, *rest)

    def hand_over(self, index: int, response: Response) -> None:
        self.handed.append((index, response.tokens.tolist()))


def gathered(entries: list[Any]) -> list[Any]:
    """The entries of all ranks, sorted."""
    shares: list[list[Any]] = [[]] * dist.get_world_size()
    dist.all_gather_object(shares, entries)
    return sorted(chain(*shares))


def both_ways(model: str) -> list[dict[str, torch.Tensor]]:
    """The weights with a small change, and with the opposite one: for one of them the estimate of the KL is positive.
    The first is that where it is far above 0; near 0, float32's error in it would be amplified."""
    weights, scale = load_file(f"{model}/model.safetensors"), 5e-3 if "llama" in model else -5e-3
    generator = torch.Generator().manual_seed(14)
    noise = {name: torch.randn(w.shape, generator=generator).double() for name, w in weights.items()}
    return [{n: w.double() + scale * noise[n] for n, w in weights.items()} for scale in (scale, -scale)]


def measure(
    model: str, layouts: list[Layout], dtypes: list[torch.dtype], vocabulary: int | None = None
) -> dict[torch.dtype, list[dict[str, Any]]]:
    """For each dtype and layout: log-probs, whole gradient, its norm after megatron's own reduction, sampled responses,
    and the largest difference of the engine's log-probs from the policy's. Empty on all ranks but the first."""
    moves = both_ways(model)
    rollouts = below(random_rollouts(questions=8, group=4), vocabulary or VOCABULARY)
    prompts = [rollouts.prompt(i).tolist() for i in range(len(rollouts))]
    results: dict[torch.dtype, list[dict[str, Any]]] = {dtype: [] for dtype in dtypes}
    for dtype, changes in product(dtypes, layouts):
        config = model_config(Path(model), **changes)
        parallel.start(config)
        policy = Policy(config, dtype=dtype, temperature=0.6, vocabulary=vocabulary)
        engine = Recording(policy)
        responses = engine.generate(prompts, range(len(prompts)), SamplingParams(0.6, 8), engine.hand_over)
        log_probs, entropies = policy.log_probs(rollouts, entropies=True)
        sampled = answered(prompts, responses)
        mismatch = policy.log_probs(sampled)[0] - sampled.generation_log_probs
        objective, old = build_objective(OBJECTIVE), OldValues(log_probs)
        for weights in moves:
            policy.load(weights.__getitem__)
            result = accumulate_gradient(policy, objective, rollouts, old, everywhere=True)
            if result.metrics["constraint/active"]:
                break
        else:
            raise AssertionError("the hinge is active in neither direction")
        results[dtype].append(
            {
                "log_probs": log_probs,
                "entropies": entropies,
                "responses": [r.tokens.tolist() for r in responses],
                "sampled": gathered(engine.sampled),
                "handed": gathered(engine.handed),
                "mismatch": float(mismatch.abs().max()),
                "gradients": {n: g.clone() for n, g in policy.named_gradients()},
                "norm": policy.step().grad_norm if policy.optimizer is not None else None,
            }
        )
    return results if is_first_rank() else {}


def measure_models(models: list[str], layouts: list[Layout]) -> list[list[dict[str, Any]]]:
    """`measure` in float64 for each model, with a vocabulary of TOKENS."""
    return [measure(model, layouts, [torch.float64], TOKENS).get(torch.float64, []) for model in models]


@pytest.fixture(scope="module", params=["qwen2-tied", "llama-untied"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_family(tmp_path_factory.mktemp(request.param), request.param))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def cosine(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Cosine similarity of two whole gradients."""
    flat = [torch.cat([gradients[name].double().flatten() for name in sorted(a)]) for gradients in (a, b)]
    return float(torch.nn.functional.cosine_similarity(flat[0], flat[1], dim=0))


def same(result: dict[str, Any], reference: dict[str, Any], tolerance: float, where: str) -> None:
    assert result["responses"] == reference["responses"], where
    assert result["mismatch"] < 1e-4, where
    torch.testing.assert_close(result["log_probs"], reference["log_probs"], rtol=0, atol=10 * tolerance)
    torch.testing.assert_close(result["entropies"], reference["entropies"], rtol=0, atol=10 * tolerance)
    for name, gradient in reference["gradients"].items():
        assert relative(result["gradients"][name], gradient) <= tolerance, (where, name)
    if reference["norm"] is not None:
        assert result["norm"] == pytest.approx(reference["norm"], rel=tolerance), where


def check(
    on_ranks: Callable[..., list[Any]], model: str, cases: dict[int, list[Layout]], dtypes: dict[int, list[torch.dtype]]
) -> None:
    """Launch each world size with its dtypes, and compare float64 and float32 with the first layout in the same dtype,
    and bf16 with the first layout in float32."""
    references: dict[torch.dtype, dict[str, Any]] = {}
    for world_size, layouts in cases.items():
        for dtype, results in on_ranks(world_size, measure, model, layouts, dtypes[world_size])[0].items():
            references.setdefault(dtype, results[0])
            for changes, result in zip(layouts, results, strict=True):
                where = f"{world_size} processes, {dtype}, {changes}"
                together = changes["tensor_model_parallel_size"] * changes["pipeline_model_parallel_size"]
                requests = range(len(result["responses"]))
                assert result["sampled"] == sorted([*requests] * together), f"not once: {where}"
                assert result["handed"] == [*enumerate(result["responses"])], f"not handed over once: {where}"
                if dtype is torch.bfloat16:
                    assert cosine(result["gradients"], references[torch.float32]["gradients"]) >= 0.999, where
                else:
                    same(result, references[dtype], 1e-9 if dtype is torch.float64 else 1e-5, where)


def test_a_representative_set(on_ranks: Callable[..., list[Any]], model: str) -> None:
    every = [torch.float64, torch.float32, torch.bfloat16]
    check(on_ranks, model, REPRESENTATIVE, {1: every, 2: every, 4: [torch.float64]})


def test_every_family(on_ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    """The families that the representative set leaves out, in one launch, with a vocabulary smaller than the output
    weight; compared with transformers."""
    rest = [family for family in FAMILIES if family not in ("qwen2-tied", "llama-untied")]
    models = [str(save_family(tmp_path / family, family)) for family in rest]
    layouts = [layout(), layout(tp=2, sp=True), layout(pp=2)]
    rollouts = below(random_rollouts(questions=8, group=4), TOKENS)
    for family, path, results in zip(rest, models, on_ranks(2, measure_models, models, layouts)[0], strict=True):
        with torch.no_grad():
            expected = reference_log_probs(reference_model(Path(path)), rollouts, 0.6, TOKENS)
        torch.testing.assert_close(results[0]["log_probs"], expected, rtol=0, atol=1e-5)
        for changes, result in zip(layouts, results, strict=True):
            same(result, results[0], 1e-9, f"{family}, {changes}")
            assert max(token for response in result["responses"] for token in response) < TOKENS


@pytest.mark.slow
@pytest.mark.parametrize("dtypes", [[torch.float64], [torch.float32, torch.bfloat16]], ids=["float64", "float32-bf16"])
def test_the_whole_matrix(on_ranks: Callable[..., list[Any]], model: str, dtypes: list[torch.dtype]) -> None:
    cases = {world_size: every_layout(world_size) for world_size in (1, 2, 4)}
    assert sum(map(len, cases.values())) == 72
    check(on_ranks, model, cases, dict.fromkeys(cases, dtypes))
