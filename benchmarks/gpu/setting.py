"""What the GPU benchmark's sections share: shapes, random models on disk, rollouts with known lengths, and timing.

`tiny` is the same program on a CPU at toy sizes, to know that it runs; its figures mean nothing.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_disco.config.schema import ModelConfig
from nemo_disco.config.shape import KNOWN, ModelShape
from nemo_disco.data.rollouts import Rollouts

TEMPERATURE = 0.6
TINY = ModelShape(2, 64, 128, 4, 2, 16, 260, tied=False, qkv_bias=True, max_positions=4096)
SHAPES = {"1p5b": KNOWN["DeepSeek-R1-Distill-Qwen-1.5B"], "7b": KNOWN["DeepSeek-R1-Distill-Qwen-7B"]}
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


@dataclass(frozen=True)
class Setting:
    """tiny: toy sizes. results: of the sections before this one."""

    tiny: bool
    results: Mapping[str, Any]

    def size(self, real: int, tiny: int) -> int:
        return tiny if self.tiny else real

    def shape(self, name: str) -> ModelShape:
        return TINY if self.tiny else SHAPES[name]

    def floor(self, name: str) -> float | None:
        """A rate that the section `floors` measured in this same run, if it did."""
        value = self.results.get("floors", {}).get(name)
        return None if value is None else float(value)


# --- models ---


@contextmanager
def model_directory(shape: ModelShape, seed: int = 0, scale: float = 0.02) -> Iterator[Path]:
    """A Hugging Face directory of a random Qwen2 in bfloat16, in memory where /dev/shm has room for it."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    config = hf_config(shape)
    needed = 2 * shape.parameters + 2**28
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > 2 * needed
    with tempfile.TemporaryDirectory(dir=memory if roomy else None) as name:
        directory = Path(name)
        with torch.device("meta"):
            parameters = dict(AutoModelForCausalLM.from_config(config).named_parameters())
        generator = torch.Generator(DEVICE).manual_seed(seed)
        tensors = {n: _random(n, tuple(p.shape), generator, scale) for n, p in parameters.items()}
        config.save_pretrained(directory)
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        del tensors
        yield directory


def hf_config(shape: ModelShape) -> Any:
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.max_positions,
        tie_word_embeddings=shape.tied,
        dtype="bfloat16",
    )


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator, scale: float) -> Tensor:
    if "norm" in name:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.randn(shape, generator=generator, device=DEVICE).mul_(scale).bfloat16().cpu()


def model_config(path: Path, token_budget: int, **changes: Any) -> ModelConfig:
    """One rank, no parallelism. changes: keys of the section `model`."""
    from nemo_disco.config.compose import compose

    overrides = [f"model.path={path}", f"model.token_budget={token_budget}", "data.train_files=[none]"]
    overrides += [f"model.{key}={'null' if value is None else value}" for key, value in changes.items()]
    return compose("config", overrides).model


def build_policy(path: Path, token_budget: int, *, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Any:
    """The product's policy, as a run would build it here."""
    from nemo_disco.policy import parallel
    from nemo_disco.policy.policy import Policy

    config = model_config(path, token_budget, **changes)
    parallel.start(config)
    return Policy(config, dtype=dtype, temperature=TEMPERATURE, clip_grad=1.0)


# --- rollouts ---


def made_up_rollouts(
    vocabulary: int, questions: int, group: int, limit: int, prompt: int, seed: int = 0, full: bool = False
) -> Rollouts:
    """Responses of up to `limit` tokens: lengths exponential with a third of it as their mean, or all `full`. Half of
    the responses are right."""
    generator = torch.Generator().manual_seed(seed)
    count = questions * group
    spread = torch.empty(count, dtype=torch.float64).exponential_(3.0 / limit, generator=generator)
    lengths = torch.full((count,), limit) if full else spread.long().clamp(8, limit)
    prompts = torch.randint(2, vocabulary, (questions, prompt), generator=generator).repeat_interleave(group, 0)
    responses = [torch.randint(2, vocabulary, (int(n),), generator=generator).tolist() for n in lengths]
    ids = [i // group for i in range(count)]
    rollouts = Rollouts.from_lists(
        prompts.tolist(), responses, [[0.0] * len(r) for r in responses], ids, [False] * count
    )
    return rollouts.with_rewards([float(i % 2) for i in range(count)])


def with_policy_scores(rollouts: Rollouts, log_probs: Tensor) -> Rollouts:
    return replace(rollouts, generation_log_probs=log_probs.float().cpu())


# --- measuring ---


def wait() -> None:
    if CUDA:
        torch.cuda.synchronize()


def seconds(work: Callable[[], object], repeats: int, warm_up: int = 1) -> float:
    """The median of so many runs, each from an idle device to an idle device."""
    for _ in range(warm_up):
        work()
    times = []
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def reset_peak() -> None:
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gb() -> float | None:
    """Of what torch allocated since reset_peak; None without CUDA."""
    return torch.cuda.max_memory_allocated() / 1e9 if CUDA else None


def relative_error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    return float((found - expected).norm() / expected.norm())
