"""Lower bounds of what each section of the benchmark computes and moves, and of its time: counted, not measured.

    python benchmarks/gpu/counts.py [--write]      print the table of README.md, or write it there

run_all.py divides what it measures by these floors. A floor is the larger of two times: the matrix products over the
matrix rate, and the bytes that must cross device memory (each number read or written once) over the bandwidth. What a
program may choose to do (compute activations again, keep them) is in no floor.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from setting import Setting, lookup

from nemo_disco.estimate.flops import TRAINING, forward_flops, peak_flops
from nemo_disco.models.shape import ModelShape

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- counts.py writes what follows -->\n", "<!-- until here -->\n"
BF16, FLOAT32 = 2, 4  # bytes
# A step: bf16 weights read and written, float32 gradients written and read, float32 weights and two moments both.
STEP_BYTES = 2 * BF16 + 2 * FLOAT32 + 2 * 3 * FLOAT32
GRADIENT_BYTES = BF16 + FLOAT32  # of a step without the optimizer


@dataclass(frozen=True)
class Rates:
    """FLOP/s in dense bf16, and bytes a second of device memory."""

    flops: float
    bandwidth: float


DATASHEET = {
    name: Rates(peak_flops(name) or 0.0, bandwidth) for name, bandwidth in (("H100", 3.35e12), ("H200", 4.8e12))
}


@dataclass(frozen=True)
class Work:
    """flops: of matrix products, a multiply-add being two. bytes: of device memory, read or written."""

    flops: float
    bytes: float

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def seconds(self, rates: Rates) -> float:
        return max(self.flops / rates.flops, self.bytes / rates.bandwidth)


@dataclass(frozen=True)
class Row:
    """A figure of the benchmark. key: its seconds in the results. predicted: times the datasheet's floor, and why."""

    key: str
    work: Callable[[Setting], Work]
    predicted: tuple[float, float]
    reason: str


# --- what is counted ---


def matrix(setting: Setting) -> Work:
    n = setting.size(8192, 256)
    return Work(2 * n**3, 3 * BF16 * n * n)


def copy(setting: Setting) -> Work:
    return Work(0, 2 * setting.size(2**32, 2**20))


def log_probs(setting: Setting) -> Work:
    """Three products; recomputing the logits, so as not to keep them, is a fourth and a choice."""
    n, v, h = setting.head()
    return Work(3 * 2 * n * v * h, BF16 * 3 * (n * h + v * h))


def attention(setting: Setting) -> Work:
    """Two products forward and four backward; q, k, v and the output, and the gradients of all four."""
    shape, lengths = setting.shape("1p5b"), setting.attention_lengths()
    pairs = sum(n * (n + 1) // 2 for n in lengths)
    numbers = sum(lengths) * 2 * (shape.query_width + shape.kv_width)
    return Work(TRAINING * 4 * shape.query_width * pairs, BF16 * 2 * numbers)


def decoding(setting: Setting) -> Work:
    """One token of each row: all weights but the embedding, and the keys and values of half the tokens on average."""
    shape, (rows, prompt, tokens) = setting.shape("1p5b"), setting.decoding()
    weights = shape.parameters - shape.embedding_parameters
    return Work(2 * weights * rows, BF16 * weights + cache_bytes(shape, rows, prompt + tokens / 2))


def cache_bytes(shape: ModelShape, rows: int, tokens: float) -> float:
    return BF16 * 2 * shape.layers * shape.kv_width * rows * tokens


def training(name: str, bytes_a_parameter: int = STEP_BYTES) -> Callable[[Setting], Work]:
    def work(setting: Setting) -> Work:
        forward, parameters = _forward(setting, name), setting.shape(name).parameters
        return Work(TRAINING * forward.flops, bytes_a_parameter * parameters)

    return work


def _forward(setting: Setting, name: str) -> Work:
    prompts, responses = setting.lengths(name)
    shape = setting.shape("1p5b" if name == "step" else name)
    totals = [p + r - 1 for p, r in zip(prompts, responses, strict=True)]
    return Work(forward_flops(shape, totals, sum(responses)), BF16 * shape.parameters)


def step_log_probs(setting: Setting) -> Work:
    """The old log-probs, and pass 1 of all mini-batches but the first (of equally many questions)."""
    once = _forward(setting, "step")
    share = 1 + (setting.MINI_BATCHES - 1) / setting.MINI_BATCHES
    return Work(share * once.flops, setting.MINI_BATCHES * once.bytes)


def step_training(setting: Setting) -> Work:
    parameters = setting.shape("1p5b").parameters
    return Work(TRAINING * _forward(setting, "step").flops, setting.MINI_BATCHES * STEP_BYTES * parameters)


def step_sampling(setting: Setting) -> Work:
    """As many tokens of each row as the section samples."""
    shape, (rows, prompt, tokens) = setting.shape("1p5b"), setting.step_sampling()
    weights = shape.parameters - shape.embedding_parameters
    moved = BF16 * weights + cache_bytes(shape, rows, prompt + tokens / 2)
    return Work(tokens * 2 * weights * rows, tokens * moved)


ROWS = (
    Row("floors.matrix_s", matrix, (1.25, 1.25), "a library's product of this size reaches some 0.8 of the datasheet"),
    Row("floors.copy_s", copy, (1.1, 1.1), "a copy reaches some 0.9 of the datasheet's bandwidth"),
    Row(
        "train_1p5b_8k.seconds",
        training("1p5b"),
        (2.35, 2.35),
        "MFU 0.40 to 0.45: FlashAttention 2, a fourth product in the head, norms and activations by bandwidth",
    ),
    Row(
        "train_1p5b_8k_long.seconds",
        training("1p5b"),
        (2.2, 2.2),
        "the same with cuDNN's attention for long sequences, less what padding and single calls cost",
    ),
    Row("baseline_unpadded.seconds", training("1p5b"), (2.8, 2.8), "cuDNN's attention, but norms, rope and Adam apart"),
    Row(
        "baseline_padded.seconds",
        training("1p5b"),
        (3.8, 3.8),
        "the same with 0.26 of its tokens padding, and more of its attention",
    ),
    Row(
        "log_probs.kernel.forward_backward_s",
        log_probs,
        (2.7, 2.7),
        "4 products for 3 at 0.8 of the rate is 1.7; the kernel's own products run at 0.6; sums by temporaries",
    ),
    Row(
        "log_probs.fused_sum.forward_backward_s",
        log_probs,
        (2.5, 2.5),
        "without 45 GB of temporaries, as they were counted (FUSED_SUM)",
    ),
    Row("log_probs.tiled.forward_backward_s", log_probs, (4.5, 4.0), "float32 logits, written and read several times"),
    Row(
        "attention.packed.forward_backward_s",
        attention,
        (3.3, 3.3),
        "FlashAttention 2 at 350 TFLOP/s, with one product more than the floor has",
    ),
    Row("attention.alone.forward_backward_s", attention, (2.0, 2.0), "cuDNN, published as 1.7 to 2.3 times as fast"),
    Row("decode.in_place.seconds_a_step", decoding, (1.8, 2.0), "weights at 0.8 of the bandwidth, some 300 launches"),
    Row("decode.in_place_without_graphs.seconds_a_step", decoding, (6.0, 8.0), "bound by launching 800 kernels"),
    Row("decode.plain.seconds_a_step", decoding, (6.0, 8.0), "bound by launching, and a look at the rows every step"),
    Row("step.seconds.generate", step_sampling, (2.5, 3.0), "as decoding in place, capturing the graph included"),
    Row("step.seconds.log_probs", step_log_probs, (2.3, 2.3), "forward passes at 0.43 of the rate"),
    Row("step.seconds.train", step_training, (2.5, 2.5), "as the training step; four updates instead of one"),
    Row(
        "train_7b_8k.seconds",
        training("7b", GRADIENT_BYTES),
        (2.7, 2.0),
        "larger matrices: MFU 0.5; on 80 GB activations are computed twice",
    ),
    Row(
        "train_qwen3_0p6b_16k.seconds",
        training("qwen3_0p6b_16k"),
        (2.8, 2.8),
        "0.6 of the work is attention at 300 TFLOP/s: MFU 0.36 (published on one H100: 0.11)",
    ),
    Row(
        "train_qwen3_0p6b_65k.seconds",
        training("qwen3_0p6b_65k"),
        (4.1, 3.2),
        "0.86 is attention; on 80 GB activations are computed twice (published on one H100: MFU 0.27)",
    ),
)


# --- what run_all and README say of it ---


def over_floors(setting: Setting, device: str, results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Of each figure that there is: its seconds over the floor by the datasheet of this device and by the rates that
    the section `floors` measured."""
    datasheet = next((rates for name, rates in DATASHEET.items() if name in device), None)
    measured_flops, measured_bandwidth = setting.floor("matrix_flops"), setting.floor("copy_bytes_per_second")
    found = {}
    for row in ROWS:
        if (seconds := lookup(results, row.key)) is None:
            continue
        work = row.work(setting)
        found[row.key] = {"seconds": seconds}
        if datasheet is not None:
            found[row.key]["times_datasheet_floor"] = seconds / work.seconds(datasheet)
        if measured_flops and measured_bandwidth:
            floor = work.seconds(Rates(measured_flops, measured_bandwidth))
            found[row.key]["times_measured_floor"] = seconds / floor
    return found


def markdown() -> str:
    """The table of README.md, at the real sizes."""
    setting = Setting(tiny=False, results={})
    head = "| figure | TFLOP | GB | floor H100 | floor H200 | predicted H100 | predicted H200 | because |"
    lines = [head, "|" + " --- |" * 8]
    for row in ROWS:
        work = row.work(setting)
        floors = [work.seconds(rates) for rates in DATASHEET.values()]
        times = [f"{f * p:.3g} s ({p:g})" for f, p in zip(floors, row.predicted, strict=True)]
        cells = [f"`{row.key}`", f"{work.flops / 1e12:.3g}", f"{work.bytes / 1e9:.3g}"]
        cells += [*(f"{floor:.3g} s" for floor in floors), *times, row.reason]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def page(text: str) -> str:
    """README.md's text with the table as it is now."""
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + "\n" + markdown() + "\n" + END + rest.partition(END)[2]


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    if parser.parse_args(None if arguments is None else list(arguments)).write:
        README.write_text(page(README.read_text()))
    else:
        print(markdown(), end="")


if __name__ == "__main__":
    main()
