"""Shapes, random models on disk, random rollouts and timing, shared by the sections of the GPU benchmark.

`tiny` runs the same program at toy sizes, also on a CPU, to test that it runs; its figures mean nothing.
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
from nemo_disco.data.rollouts import Rollouts
from nemo_disco.models.architecture import ARCHITECTURES
from nemo_disco.models.shape import PUBLISHED, ModelShape

TEMPERATURE = 0.6
TINY = ModelShape(2, 64, 128, 4, 2, 16, 260, tied=False, architecture=ARCHITECTURES["qwen2"], max_positions=4096)
TINY_QWEN3 = replace(TINY, tied=True, architecture=ARCHITECTURES["qwen3"])
# Qwen3-0.6B, with positions for the longest context for which a speed is published.
QWEN3 = ModelShape(
    28, 1024, 3072, 16, 8, 128, 151936, tied=True, architecture=ARCHITECTURES["qwen3"], max_positions=131072
)
SHAPES = {"1p5b": PUBLISHED["DeepSeek-R1-Distill-Qwen-1.5B"], "7b": PUBLISHED["DeepSeek-R1-Distill-Qwen-7B"]}
SHAPES |= {"qwen3_0p6b_16k": QWEN3, "qwen3_0p6b_65k": QWEN3}
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


@dataclass(frozen=True)
class RolloutSizes:
    """Numbers and lengths of random rollouts. Lengths are drawn from an exponential distribution whose mean is a third
    of the limit; with `full` all responses have the limit's length.

    group: responses to each question. limit: most tokens of a response. prompt: tokens of each prompt.
    """

    questions: int
    group: int
    limit: int
    prompt: int
    full: bool = False

    @property
    def responses(self) -> int:
        """Number of all responses."""
        return self.questions * self.group

    def response_lengths(self, seed: int = 0) -> list[int]:
        """Tokens of each response: between 8 and the limit."""
        if self.full:
            return [self.limit] * self.responses
        generator = torch.Generator().manual_seed(seed)
        spread = torch.empty(self.responses, dtype=torch.float64).exponential_(3.0 / self.limit, generator=generator)
        return spread.long().clamp(8, self.limit).tolist()


# Prompts of 256 tokens. 1.5B and 7B: responses up to 8192; Qwen3-0.6B: full contexts of 16k and 64k.
ROLLOUTS = {
    "1p5b": RolloutSizes(4, 8, 8192, 256),
    "7b": RolloutSizes(1, 8, 8192, 256),
    "qwen3_0p6b_16k": RolloutSizes(1, 2, 16384 - 256, 256, full=True),
    "qwen3_0p6b_65k": RolloutSizes(1, 1, 65536 - 256, 256, full=True),
    "step": RolloutSizes(8, 8, 4096, 256),
}
TINY_ROLLOUTS = dict.fromkeys(("1p5b", "7b"), RolloutSizes(2, 4, 48, 8)) | {
    "qwen3_0p6b_16k": RolloutSizes(1, 2, 56, 8, full=True),
    "qwen3_0p6b_65k": RolloutSizes(1, 1, 120, 8, full=True),
    "step": RolloutSizes(4, 4, 32, 6),
}


@dataclass(frozen=True)
class Setting:
    """Sizes at which a section of the benchmark runs, and the results of the sections before it.

    tiny: toy sizes instead of the real ones. results: the result of each section by its name.
    """

    tiny: bool
    results: Mapping[str, Any]

    def size(self, real: int, tiny: int) -> int:
        """`tiny` if sizes are toy sizes, else `real`."""
        return tiny if self.tiny else real

    def shape(self, name: str) -> ModelShape:
        """The shape of that name in SHAPES, or a toy shape of the same architecture."""
        return (TINY_QWEN3 if name.startswith("qwen3") else TINY) if self.tiny else SHAPES[name]

    # --- the sizes of the sections ---

    MINI_BATCHES = 4  # of the section `step`

    def rollout_sizes(self, name: str) -> RolloutSizes:
        """Sizes of the rollouts for a shape of SHAPES, or for the section `step`."""
        if self.tiny:
            return TINY_ROLLOUTS[name]
        return ROLLOUTS[name]

    def lengths(self, name: str) -> tuple[list[int], list[int]]:
        """Tokens of each prompt and of each response of the rollouts whose sizes have that name."""
        sizes = self.rollout_sizes(name)
        return [sizes.prompt] * sizes.responses, sizes.response_lengths()

    def head_sizes(self) -> tuple[int, int, int]:
        """Number of tokens, vocabulary and hidden size in the section `log_probs`."""
        return self.size(32768, 96), self.size(151936, 300), self.size(1536, 32)

    def attention_lengths(self) -> list[int]:
        """Tokens of each sequence in a micro-batch of long ones, shortest first; no kernel's tile divides them."""
        return [self.size(n, n // 100) for n in (2731, 5461, 8192 + 255)]

    def decoding_sizes(self) -> tuple[int, int, int]:
        """Number of rows, tokens of a prompt and tokens of a response in the section `decode`."""
        return self.size(128, 4), self.size(128, 6), self.size(512, 12)

    def step_sampling_sizes(self) -> tuple[int, int, int]:
        """Number of rows, tokens of a prompt and tokens that are sampled for each row in the section `step`."""
        sizes = self.rollout_sizes("step")
        return sizes.responses, sizes.prompt, self.size(256, 6)

    def measured_rate(self, name: str) -> float | None:
        """A rate (FLOP/s or bytes per second) among the results of the section `floors`; None if it is not there."""
        value = self.results.get("floors", {}).get(name)
        return None if value is None else float(value)


def look_up(results: Mapping[str, Any], key: str) -> float | None:
    """The number at a dotted key of the results (True is 1.0); None if there is no number."""
    value: Any = results
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return None if value is None or isinstance(value, (str, Mapping)) else float(value)


# --- models ---


@contextmanager
def model_directory(shape: ModelShape, seed: int = 0, scale: float = 0.02) -> Iterator[Path]:
    """Context with a Hugging Face directory of a random Qwen2 or Qwen3 in bfloat16, in /dev/shm if it has room.

    scale: standard deviation of the weights.
    """
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    config = build_hf_config(shape)
    needed_bytes = 2 * shape.parameters + 2**28
    memory = Path("/dev/shm")
    has_room = memory.is_dir() and shutil.disk_usage(memory).free > 2 * needed_bytes
    with tempfile.TemporaryDirectory(dir=memory if has_room else None) as name:
        directory = Path(name)
        with torch.device("meta"):
            parameters = dict(AutoModelForCausalLM.from_config(config).named_parameters())
        generator = torch.Generator(DEVICE).manual_seed(seed)
        tensors = {n: _random_weight(n, tuple(p.shape), generator, scale) for n, p in parameters.items()}
        config.save_pretrained(directory)
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        del tensors
        yield directory


def build_hf_config(shape: ModelShape) -> Any:
    """A transformers config with this shape's architecture and sizes."""
    from transformers import AutoConfig

    head_dim = {"head_dim": shape.head_dim} if "head_dim" in shape.architecture.absent else {}
    return AutoConfig.for_model(
        shape.architecture.model_type,
        **head_dim,
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


def _random_weight(name: str, shape: tuple[int, ...], generator: torch.Generator, scale: float) -> Tensor:
    """A weight in bfloat16 on the CPU: ones for a norm, else normal with the standard deviation `scale`."""
    if "norm" in name:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.randn(shape, generator=generator, device=DEVICE).mul_(scale).bfloat16().cpu()


def compose_model_config(path: Path, token_budget: int, **changes: Any) -> ModelConfig:
    """The setting `model` for one rank. changes: keys of it with their values, in place of the defaults."""
    from nemo_disco.config.compose import compose

    overrides = [f"model.path={path}", f"model.token_budget={token_budget}", "data.train_files=[none]"]
    overrides += [f"model.{key}={'null' if value is None else value}" for key, value in changes.items()]
    return compose("config", overrides).model


def build_policy(
    path: Path,
    token_budget: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    with_optimizer: bool = True,
    **changes: Any,
) -> Any:
    """The policy that a run on this one device would have. changes: as in compose_model_config."""
    from nemo_disco.policy import parallel
    from nemo_disco.policy.policy import Policy

    config = compose_model_config(path, token_budget, **changes)
    parallel.start(config)
    return Policy(config, dtype=dtype, temperature=TEMPERATURE, clip_grad=1.0, with_optimizer=with_optimizer)


# --- rollouts ---


def make_random_rollouts(vocabulary: int, sizes: RolloutSizes, seed: int = 0) -> Rollouts:
    """Rollouts of random tokens; every second response is right."""
    generator = torch.Generator().manual_seed(seed)
    shape = sizes.questions, sizes.prompt
    prompts = torch.randint(2, vocabulary, shape, generator=generator).repeat_interleave(sizes.group, 0)
    lengths = sizes.response_lengths(seed)
    responses = [torch.randint(2, vocabulary, (n,), generator=generator).tolist() for n in lengths]
    ids = [i // sizes.group for i in range(sizes.responses)]
    rollouts = Rollouts.pack(
        prompts.tolist(), responses, [[0.0] * len(r) for r in responses], ids, [False] * sizes.responses
    )
    return rollouts.with_rewards([float(i % 2) for i in range(sizes.responses)])


def with_generation_log_probs(rollouts: Rollouts, log_probs: Tensor) -> Rollouts:
    """The same rollouts with these log-probs [T] as the engine's."""
    return replace(rollouts, generation_log_probs=log_probs.float().cpu())


# --- measuring ---


@contextmanager
def override_attributes(target: Any, **values: Any) -> Iterator[None]:
    """Context in which attributes of a module or object have these values; afterwards they have their old ones."""
    old_values = {name: getattr(target, name) for name in values}
    try:
        for name, value in values.items():
            setattr(target, name, value)
        yield
    finally:
        for name, value in old_values.items():
            setattr(target, name, value)


def synchronize() -> None:
    """Wait until the GPU is idle."""
    if CUDA:
        torch.cuda.synchronize()


def measure_seconds(work: Callable[[], object], repeats: int, warm_up: int = 1) -> float:
    """Median seconds of `repeats` calls, each timed from an idle device to an idle device, after `warm_up` others."""
    for _ in range(warm_up):
        work()
    times = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        work()
        synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def reset_peak() -> None:
    """Free torch's unused memory and restart the record that peak_gb reads."""
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gb() -> float | None:
    """The most memory in GB that torch had allocated at one time since reset_peak; None without CUDA."""
    return torch.cuda.max_memory_allocated() / 1e9 if CUDA else None


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of `expected`, in float64."""
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    return float((actual - expected).norm() / expected.norm())
