"""The plan's memory estimate agrees with the peak resident memory of real processes during a training step.

The peak is VmHWM, which counts all touched pages, also those that no tensor library reports, and which is reset before
each step. It is meaningful only if freed tensors are returned to the kernel at once (MALLOC_*). The baseline is the
resident memory before the policy is built, after everything has been imported and run once.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import model_config, save_model

from nemo_disco.commands.plan import find_workload
from nemo_disco.config.compose import compose
from nemo_disco.data.rollouts import Rollouts
from nemo_disco.estimate.memory import Layout, Memory, estimate_memory
from nemo_disco.models.shape import read_shape
from nemo_disco.policy import parallel
from nemo_disco.policy.policy import Policy

PROMPT, RESPONSE, BUDGET = 64, 449, 4096  # the model reads 512 tokens of each sequence: 8 sequences fill a micro-batch
GROUP = 4
SMALL = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_key_value_heads": 2}
WIDE = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8, "num_key_value_heads": 2}
# Most of its weights are the embedding and the output layer.
SHALLOW = {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 2, "num_key_value_heads": 4}
WIDE_HEADS = SMALL | {"intermediate_size": 128, "head_dim": 128}


def make_rollouts(questions: int) -> Rollouts:
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(0, 1000, (count,), generator=generator).tolist()

    prompts = [prompt for _ in range(questions) for prompt in [tokens(PROMPT)] * GROUP]
    responses = [tokens(RESPONSE) for _ in prompts]
    zeros = [[0.0] * RESPONSE] * len(prompts)
    return Rollouts.pack(prompts, responses, zeros, [i // GROUP for i in range(len(prompts))], [False] * len(zeros))


def read_status(field: str) -> int:
    """Bytes of a memory field of /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def train(policy: Policy, questions: int) -> int:
    """Take two optimizer steps. Returns the peak bytes during the second; the first allocates the optimizer's state."""
    batch = make_rollouts(questions)
    weights = torch.randn(len(batch) * RESPONSE) * 1e-6
    for _ in range(2):
        Path("/proc/self/clear_refs").write_text("5")
        policy.log_probs(batch, entropies=True)
        policy.accumulate(batch, lambda index, values: weights[index] * values.log_probs)
        assert policy.step().applied
    return read_status("VmHWM")


def measure(small: str, model: str, layouts: list[dict[str, Any]], dtype: torch.dtype, questions: int) -> list[int]:
    """This rank's peak bytes above the baseline, for each layout. The model `small` runs first to import all."""
    peaks = []
    for path, changes in [(small, layouts[0]), *((model, changes) for changes in layouts)]:
        config = model_config(Path(path), token_budget=BUDGET, **changes)
        parallel.start(config)
        gc.collect()
        before = read_status("VmRSS")
        policy = Policy(config, dtype=dtype)
        peaks.append(train(policy, questions if path == model else 1) - before)
        del policy
    return peaks[1:]


def estimate(model: str, changes: dict[str, Any], world_size: int, precision: str, questions: int) -> Memory:
    overrides = [
        f"model.path={model}",
        "data.train_files=[none]",
        f"trainer.precision={precision}",
        f"data.questions_per_step={questions}",
        f"algorithm.mini_batch_questions={questions}",
        f"generation.responses_per_question={GROUP}",
        f"generation.max_response_length={RESPONSE}",
        f"data.max_prompt_length={PROMPT - 1}",
        f"model.token_budget={BUDGET}",
        *(f"model.{key}={value}" for key, value in changes.items()),
    ]
    config = compose(overrides=overrides)
    layout = Layout.from_config(config.model, world_size)
    return estimate_memory(find_workload(config), read_shape(model), layout, cuda=False)


def check(
    run_on_new_ranks: Callable[..., list[Any]],
    directory: Path,
    shape: dict[str, int],
    world_size: int,
    layouts: list[dict[str, Any]],
    precision: str = "32",
    questions: int = 4,
    architecture: str = "qwen2",
) -> None:
    """Check that measured and estimated peaks agree within 15%. questions: of a mini-batch; two fill a micro-batch."""
    sizes = {"vocab_size": 4096, "max_position_embeddings": 1024, "num_attention_heads": 8}
    model = str(save_model(directory / "model", architecture, tied=False, **(sizes | shape)))
    small = str(save_model(directory / "small", architecture, tied=False, **(sizes | {"hidden_size": 64})))
    dtype = {"32": torch.float32, "bf16": torch.bfloat16}[precision]
    ranks = run_on_new_ranks(world_size, measure, small, model, layouts, dtype, questions)
    for changes, *peaks in zip(layouts, *ranks, strict=True):
        expected = estimate(model, changes, world_size, precision, questions)
        figures = f"{changes}: measured {[p >> 20 for p in peaks]} MiB, estimated {expected.training >> 20}: {expected}"
        assert expected.training == pytest.approx(max(peaks), rel=0.15), figures


@pytest.fixture(autouse=True)
def _return_freed_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "0")


FULL, SELECTIVE = ({"activations_checkpoint_granularity": g} for g in ("full", "selective"))
TP, PP, CP = ({f"{kind}_parallel_size": 2} for kind in ("tensor_model", "pipeline_model", "context"))
SP = TP | {"sequence_parallel": True}
VPP = PP | {"virtual_pipeline_model_parallel_size": 2}


def test_one_process(run_on_new_ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    """The model has norms of queries and keys."""
    check(run_on_new_ranks, tmp_path, WIDE_HEADS, 1, [{}], questions=2, architecture="qwen3")


@pytest.mark.slow
@pytest.mark.parametrize("shape", [WIDE, SHALLOW], ids=["wide", "shallow"])
def test_two_processes(run_on_new_ranks: Callable[..., list[Any]], tmp_path: Path, shape: dict[str, int]) -> None:
    check(run_on_new_ranks, tmp_path, shape, 2, [{}, FULL, TP, TP | FULL, SP, SP | SELECTIVE, PP, PP | FULL, CP])


@pytest.mark.slow
def test_four_processes(run_on_new_ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    check(run_on_new_ranks, tmp_path, WIDE, 4, [SP | PP, TP | FULL, PP, VPP], questions=16)


@pytest.mark.slow
def test_bfloat16(run_on_new_ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    check(run_on_new_ranks, tmp_path, WIDE, 1, [{}, FULL, SELECTIVE], "bf16")


@pytest.mark.slow
def test_norms_of_queries_and_keys(run_on_new_ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    check(run_on_new_ranks, tmp_path, WIDE_HEADS, 1, [{}, FULL, SELECTIVE], "bf16", architecture="qwen3")
    check(run_on_new_ranks, tmp_path, WIDE_HEADS, 2, [TP, SP, CP], architecture="qwen3")


EXPERTS = {
    "hidden_size": 256,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "num_experts": 8,
}
EP = {"expert_model_parallel_size": 2}
ETP1 = SP | {"expert_tensor_parallel_size": 1}


def test_experts(run_on_new_ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    check(run_on_new_ranks, tmp_path, EXPERTS, 1, [{}], questions=2, architecture="qwen3_moe")


@pytest.mark.slow
def test_experts_on_two_and_four_processes(run_on_new_ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    two = [EP, EP | FULL, EP | CP, SP, ETP1, ETP1 | EP]
    check(run_on_new_ranks, tmp_path / "two", EXPERTS, 2, two, architecture="qwen3_moe")
    four = [{"expert_model_parallel_size": 4}, EP | PP, EP | ETP1]
    check(run_on_new_ranks, tmp_path / "four", EXPERTS, 4, four, questions=8, architecture="qwen3_moe")
